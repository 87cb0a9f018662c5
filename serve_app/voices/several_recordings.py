"""Several recordings of one speaker as one reference: each checked like a single one, then put in a row."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import soundfile
import soxr

from engines.contract import Samples
from serve_app.errors import AudioTooLong, InvalidValue, VoiceCloneError
from serve_app.voices.reference import CheckedReference, ReferenceReader, decode_flac, fingerprint_of


async def read_recordings(reader: ReferenceReader, uploads: Sequence[bytes]) -> CheckedReference:
    """Check all ``uploads``, in order, as ``reader`` does, and join them.

    Raises what ``ReferenceReader.read`` raises, with the number of the recording if there are several;
    ``InvalidValue`` for too many of them and ``AudioTooLong`` for too much in all.
    """
    limits = reader.limits
    if len(uploads) > limits.max_recordings:
        raise InvalidValue(
            f"There are {len(uploads)} recordings; {limits.max_recordings} are accepted. Send the best.",
            param="audio_sample",
        )
    if len(uploads) == 1:
        return await reader.read(uploads[0])
    checked = []
    for number, upload in enumerate(uploads, start=1):
        try:
            checked.append(await reader.read(upload))
        except VoiceCloneError as error:
            told = f"Recording {number} of {len(uploads)}: {error.message}"
            raise type(error)(told, param=error.param, retry_after_s=error.retry_after_s) from error
    total_s = sum(recording.duration_s for recording in checked)
    if total_s > limits.max_total_s:
        raise AudioTooLong(
            f"The recordings have {total_s:.1f} s in all; {limits.max_total_s:g} s are accepted. Send fewer."
        )
    return joined(checked)


def joined(recordings: Sequence[CheckedReference]) -> CheckedReference:
    """``recordings`` in a row at the highest of their sample rates."""
    rate = max(recording.sample_rate_hz for recording in recordings)
    parts = [_at_rate(recording, rate) for recording in recordings]
    flac = io.BytesIO()
    soundfile.write(flac, np.concatenate(parts), rate, format="FLAC", subtype="PCM_24")
    stored, _ = decode_flac(flac.getvalue())
    return CheckedReference(
        samples=stored,
        sample_rate_hz=rate,
        duration_s=len(stored) / rate,
        warnings=tuple(dict.fromkeys(warning for recording in recordings for warning in recording.warnings)),
        flac=flac.getvalue(),
        fingerprint=fingerprint_of(stored, rate),
        cuts=tuple(np.cumsum([len(part) for part in parts[:-1]]).tolist()),
    )


def _at_rate(recording: CheckedReference, rate_hz: int) -> Samples:
    if recording.sample_rate_hz == rate_hz:
        return recording.samples
    resampled: Samples = soxr.resample(recording.samples, recording.sample_rate_hz, rate_hz)
    # A peak between two samples may be higher than both.
    return resampled.clip(-1, 1)

"""What the converter needs to know of a voice, from a recording of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from engines.contract import Reference, ReferenceUnusable, Samples
from engines.openvoice.converter import Converter
from engines.openvoice.silence import without_silence
from engines.pitch import track_f0

#: Longest piece that is embedded at once; the mean is taken, as in the original ``se_extractor.py``.
_PIECE_S = 10.0
#: Pitch of a recording in which none is found: between the usual pitch of men and of women.
_UNKNOWN_PITCH_HZ = 155.0


@dataclass(frozen=True, slots=True)
class VoiceColour:
    """``embedding`` [colours], float32, and median pitch."""

    embedding: NDArray[np.float32]
    pitch_hz: float

    def to_arrays(self) -> dict[str, NDArray[np.float32]]:
        """As conditioning is stored."""
        return {"tone_colour": self.embedding, "pitch_hz": np.asarray([self.pitch_hz], np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> VoiceColour:
        """What ``to_arrays`` gave. Raises ``KeyError`` or ``ValueError``."""
        embedding = np.asarray(arrays["tone_colour"], np.float32)
        pitch_hz = float(arrays["pitch_hz"].item())
        if embedding.ndim != 1 or not np.isfinite(embedding).all() or not pitch_hz > 0:
            raise ValueError("no tone colour")
        return cls(embedding, pitch_hz)


def enrol(
    converter: Converter, reference: Reference, *, min_speech_s: float, max_speech_s: float
) -> VoiceColour:
    """The colour of ``reference``, from its first ``max_speech_s`` of sound. Raises ``ReferenceUnusable``."""
    samples = without_silence(reference.samples, reference.sample_rate_hz)
    speech_s = len(samples) / reference.sample_rate_hz
    if not speech_s:
        raise ReferenceUnusable(
            "The recording is silent.", next_step="Check the microphone and record again."
        )
    if speech_s < min_speech_s:
        raise ReferenceUnusable(
            f"The recording holds {speech_s:.1f} s of sound; {min_speech_s:g} s are needed.",
            next_step=f"Record at least {min_speech_s:g} s of speech; 5 to 15 s are best.",
        )
    return measure(
        converter, samples[: int(max_speech_s * reference.sample_rate_hz)], reference.sample_rate_hz
    )


def measure(converter: Converter, samples: Samples, sample_rate_hz: int) -> VoiceColour:
    """The colour of speech [n] at any rate, at least ``Converter.fewest_samples`` long."""
    speech = np.asarray(soxr.resample(samples, sample_rate_hz, converter.sample_rate_hz), np.float32)
    pieces = np.array_split(speech, -(-len(speech) // int(_PIECE_S * converter.sample_rate_hz)))
    f0_hz = track_f0(speech, converter.sample_rate_hz)
    voiced_hz = f0_hz[f0_hz > 0]
    pitch_hz = float(np.median(voiced_hz)) if len(voiced_hz) else _UNKNOWN_PITCH_HZ
    return VoiceColour(converter.tone_colour(pieces), pitch_hz)

"""A voice of GPT-SoVITS: a few seconds of the speaker and the words spoken in them.

That is all a conditioning holds, so it does not depend on weights: other checkpoints, and the official
server, speak with the same voices. What a model computes from it is computed where the model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from engines.contract import ConditioningMismatch, Reference, ReferenceUnusable, Samples
from engines.gpt_sovits.reference_window import LONGEST_S, SHORTEST_S, reference_window

#: Changes whenever the same recording would give other arrays.
FINGERPRINT = "reference-1"
RATE_HZ = 32_000
#: Peaks below this are silence (-60 dBFS).
_SILENCE_LEVEL = 1e-3


@dataclass(frozen=True, slots=True)
class Voice:
    """``samples``: mono float32 [n] at 32 kHz, 3 to 10 s. ``transcript``: the words in them, or empty.

    ``language``: BCP-47 primary subtag of the transcript, or empty if unknown.
    """

    samples: Samples
    transcript: str
    language: str

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """What a ``Conditioning`` holds: ``samples``, and both texts as UTF-8 in uint8 [n]."""
        return {
            "samples": self.samples,
            "transcript": _bytes_of(self.transcript),
            "language": _bytes_of(self.language),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Voice:
        """Read what ``to_arrays`` gave. Raises ``ConditioningMismatch``."""
        try:
            samples = np.ascontiguousarray(arrays["samples"], np.float32)
            texts = [arrays[name].astype(np.uint8).tobytes().decode() for name in ("transcript", "language")]
        except (KeyError, ValueError) as error:
            raise _unlike("it holds no samples, transcript and language") from error
        if samples.ndim != 1 or not SHORTEST_S * RATE_HZ <= len(samples) <= LONGEST_S * RATE_HZ:
            raise _unlike(f"its samples are not {SHORTEST_S:g} to {LONGEST_S:g} s of mono at {RATE_HZ} Hz")
        return cls(samples, *texts)


def extract_voice(reference: Reference) -> Voice:
    """The voice of the best part of ``reference``.

    Raises ``ReferenceUnusable`` if it is too short or silent.
    """
    if not np.any(np.abs(reference.samples) > _SILENCE_LEVEL):
        raise ReferenceUnusable(
            "The recording is silent.", next_step="Record the speaker again, closer to the microphone."
        )
    window = reference_window(reference)
    samples = np.ascontiguousarray(window.samples, np.float32)
    if reference.sample_rate_hz != RATE_HZ:
        samples = np.asarray(soxr.resample(samples, reference.sample_rate_hz, RATE_HZ), np.float32)
    # Resampling rounds to whole samples: at the limits by one more or less than allowed.
    samples = samples[: round(LONGEST_S * RATE_HZ)]
    missing = round(SHORTEST_S * RATE_HZ) - len(samples)
    if missing > 0:
        samples = np.pad(samples, (0, missing))
    return Voice(samples.clip(-1, 1), window.transcript.strip(), reference.language)


def _bytes_of(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _unlike(reason: str) -> ConditioningMismatch:
    return ConditioningMismatch(
        f"The conditioning is not a voice of GPT-SoVITS: {reason}.",
        next_step="Extract it again from the reference recording.",
    )

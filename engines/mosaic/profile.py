"""A voice as the arrays that are stored of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.contract import ConditioningMismatch
from engines.mosaic.source_filter import Parts
from engines.mosaic.spectrum import F32, Bool

_LOWEST_F0_HZ, _HIGHEST_F0_HZ = 50.0, 600.0


@dataclass(frozen=True, slots=True)
class VoiceProfile:
    """All that is kept of a speaker. Gains are natural logs of amplitude unless noted."""

    #: log F0 of the voice = ``f0_scale`` * log F0 of the base voice + ``f0_offset``.
    f0_scale: float
    f0_offset: float
    #: Formant frequencies of the voice over those of the base voice.
    vocal_tract_ratio: float
    #: Up to here the recording says something about the voice.
    bandwidth_hz: float
    #: Level of the voice, the same for every utterance.
    level: float
    #: Frames of the base voice below this log energy are silence.
    speech_floor: float
    #: Long-term gain before matching, [BINS].
    equaliser: F32
    #: Gain after matching, [BINS]; flat until the voice is refined.
    closing_equaliser: F32
    #: Log-mel spectra of the speaker's speech frames, [units, MEL_BANDS] float16, and whether each is voiced.
    unit_log_mel: NDArray[np.float16]
    unit_voiced: Bool
    #: The same of the base voice, shaped and equalised: where the moves towards the speaker start.
    base_log_mel: NDArray[np.float16]
    base_voiced: Bool
    #: GE2E embedding of the recording, [256].
    speaker: F32

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """One array per field, as a conditioning holds them; numbers have shape [1]."""
        return {name: np.atleast_1d(np.asarray(getattr(self, name))) for name in _FIELD_NAMES}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> VoiceProfile:
        """Inverse of ``to_arrays``. Raises ``ConditioningMismatch`` if an array lacks."""
        try:
            values = {name: arrays[name] for name in _FIELD_NAMES}
            numbers = {name: values[name].item() for name in _NUMBERS}
        except (KeyError, ValueError) as error:
            raise ConditioningMismatch(
                "The conditioning does not hold a mosaic voice.",
                next_step="Extract it again from the reference recording.",
            ) from error
        return cls(**{**values, **numbers})


_FIELD_NAMES = tuple(field.name for field in fields(VoiceProfile))
_NUMBERS = (
    "f0_scale",
    "f0_offset",
    "vocal_tract_ratio",
    "bandwidth_hz",
    "level",
    "speech_floor",
)


def with_pitch(parts: Parts, scale: float, offset: float) -> Parts:
    """``parts`` with log F0 mapped to ``scale`` * log F0 + ``offset``."""
    pitched = parts.pitched
    f0_hz = parts.f0_hz.copy()
    mapped = np.exp(np.log(f0_hz[pitched]) * np.float32(scale) + np.float32(offset))
    f0_hz[pitched] = np.clip(mapped, _LOWEST_F0_HZ, _HIGHEST_F0_HZ)
    return replace(parts, f0_hz=f0_hz)

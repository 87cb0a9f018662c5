"""The configured base speakers as the converter knows them, and which one speaks for whom."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import soxr
from numpy.typing import NDArray
from safetensors import SafetensorError

from engines.calibration_texts import CALIBRATION_TEXTS
from engines.contract import ModelError, Samples
from engines.openvoice.base_speaker import BaseSpeaker
from engines.openvoice.converter import Converter
from engines.openvoice.tone_colour import VoiceColour, measure

logger = logging.getLogger(__name__)

_CALIBRATION_SEED = 0


@dataclass(frozen=True, slots=True)
class BaseVoice:
    """A base speaker with its own tone colour, which the converter takes away, and its pitch."""

    speaker: BaseSpeaker
    own: VoiceColour


class BaseVoices:
    """All base voices, in the order of the configuration."""

    def __init__(self, voices: Sequence[BaseVoice]) -> None:
        self._voices = tuple(voices)

    @property
    def languages(self) -> tuple[str, ...]:
        """Every language that some voice speaks."""
        return tuple(dict.fromkeys(code for voice in self._voices for code in voice.speaker.languages))

    def nearest(self, language: str, pitch_hz: float) -> BaseVoice:
        """The voice that speaks ``language`` and whose pitch is nearest on a logarithmic scale.

        The converter keeps the pitch of what it converts, so the base voice decides how high the result is.
        """
        able = [voice for voice in self._voices if language in voice.speaker.languages]
        return min(able, key=lambda voice: abs(math.log(voice.own.pitch_hz / pitch_hz)))

    def close(self) -> None:
        """Close all speakers."""
        for voice in self._voices:
            voice.speaker.close()


class BaseColours:
    """Tone colours of base speakers, measured once on their own speech and kept in ``folder``."""

    def __init__(self, converter: Converter, weights_fingerprint: str, folder: Path) -> None:
        self._converter = converter
        self._fingerprint = weights_fingerprint
        self._folder = folder

    def of(self, speaker: BaseSpeaker) -> BaseVoice:
        """``speaker`` with its colour, from the folder if it is there. Raises ``ModelError``."""
        key = hashlib.sha256(f"{self._fingerprint} {speaker.identity}".encode()).hexdigest()[:32]
        path = self._folder / f"{key}.safetensors"
        colour = _read(path)
        if colour is None:
            colour = self._measured(speaker)
            _write(path, colour)
        return BaseVoice(speaker, colour)

    def _measured(self, speaker: BaseSpeaker) -> VoiceColour:
        language = next((code for code in speaker.languages if code in CALIBRATION_TEXTS), None)
        if language is None:
            raise ModelError(
                f"There is no text in any language of the base voice {speaker.name} "
                f"({', '.join(speaker.languages)}) by which to measure its tone colour.",
                next_step=f"Use base voices of these languages: {', '.join(sorted(CALIBRATION_TEXTS))}.",
            )
        said = speaker.speak(CALIBRATION_TEXTS[language], language, 1.0, _CALIBRATION_SEED)
        speech = np.concatenate([sentence.samples for sentence in said])
        return measure(self._converter, speech, speaker.sample_rate_hz)


def at_rate(samples: Samples, from_hz: int, to_hz: int) -> Samples:
    """``samples`` [n] at another rate."""
    if from_hz == to_hz:
        return samples
    resampled: NDArray[np.float32] = soxr.resample(samples, from_hz, to_hz)
    return resampled


def _read(path: Path) -> VoiceColour | None:
    """What ``_write`` wrote; None if it is not there or not readable."""
    try:
        return VoiceColour.from_arrays(safetensors.numpy.load(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        logger.warning("The tone colour in %s cannot be read and is measured again: %s", path, error)
        return None


def _write(path: Path, colour: VoiceColour) -> None:
    """Whole or not at all: several replicas may write the same file at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(safetensors.numpy.save(colour.to_arrays()))
        os.replace(file.name, path)  # noqa: PTH105 - as short, and the name is no Path
    except OSError as error:
        # Measured again at the next start: a second of work, no reason not to speak.
        logger.warning("The tone colour of a base voice cannot be kept in %s: %s", path.parent, error)

"""Other languages than English: text to samples through espeak-ng, if its optional extra is installed.

espeak-ng is GPL-3.0-or-later and never part of the default installation; this module starts it as a program
of its own (``espeak_process`` says why) and takes samples from it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engines.contract import ModelCorrupt, ModelMissing, NothingToSpeak, SynthesisFailed
from engines.mosaic import espeak_process
from engines.mosaic.spectrum import F32, SAMPLE_RATE_HZ, resample

#: What pip installs to get other languages.
EXTRA = "voice-clone-tts[espeak]"
_PACKAGE = "espeakng_loader"

#: Languages the extra adds.
LANGUAGES = ("cs", "de", "el", "es", "fr", "it", "nl", "pl", "pt", "ru", "sv", "tr", "uk")

_REPAIR = (
    f"Install it again: pip install --force-reinstall '{EXTRA}'; "
    "or uninstall espeakng-loader to speak English only."
)

#: The library's settings of pitch and of its range go from 0 to 99.
_HIGHEST_SETTING = 99
#: Speakers above this are spoken for by the higher variant: 120 to 300 Hz instead of 70 to 170.
_HIGH_VOICE_HZ = 150.0
_HIGH_VARIANT = "f1"
#: Log F0 per step of the pitch setting.
_PITCH_STEP = 0.0094
#: Far more than the longest utterance takes; a program that hangs must not take its slot for ever.
_TIMEOUT_S = 60.0
_SILENT = 1e-3


@dataclass(frozen=True, slots=True)
class Manner:
    """How espeak-ng speaks: ``variant`` of the voice ("" is none), ``pitch`` and ``pitch_range`` 0 to 99."""

    variant: str
    pitch: int = 50
    pitch_range: int = 50

    @classmethod
    def near(cls, f0_hz: float) -> Manner:
        """Medium pitch of the variant that can reach ``f0_hz``."""
        return cls(_HIGH_VARIANT if f0_hz > _HIGH_VOICE_HZ else "")

    def moved(self, log_f0: float, spread_ratio: float) -> Manner:
        """Higher by ``log_f0``, with ``spread_ratio`` times the pitch range, as far as the settings go."""
        return replace(
            self,
            pitch=_setting(self.pitch + log_f0 / _PITCH_STEP),
            pitch_range=_setting(self.pitch_range * spread_ratio),
        )


class EspeakSpeech:
    """espeak-ng as installed. Stateless: any number of threads may speak at once."""

    def __init__(self, library: Path, data: Path) -> None:
        self._command = [sys.executable, "-I", "-S", espeak_process.__file__, str(library), str(data)]

    @classmethod
    def installed(cls) -> EspeakSpeech | None:
        """The library of the extra, after it has spoken once; None if the extra is not installed.

        Raises ``ModelMissing`` or ``ModelCorrupt`` if it is installed but cannot speak.
        """
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent
        library, data = folder / "libespeak-ng.so", folder / "espeak-ng-data"
        for path in (library, data):
            if not path.exists():
                raise ModelMissing(f"espeak-ng lacks {path}.", next_step=_REPAIR)
        speech = cls(library, data)
        try:
            speech.speak("a", LANGUAGES[0], Manner(""))
        except (SynthesisFailed, NothingToSpeak) as error:
            raise ModelCorrupt(f"espeak-ng does not work: {error.message}", next_step=_REPAIR) from error
        return speech

    def speak(self, text: str, language: str, manner: Manner, speed: float = 1.0) -> F32:
        """Samples [n] of ``text`` at 24 kHz, the same each time. ``language`` is one of ``LANGUAGES``.

        Markup is text like any other. Raises ``NothingToSpeak`` or ``SynthesisFailed``.
        """
        plain = _without_controls(text)
        voice = f"{language}+{manner.variant}" if manner.variant else language
        arguments = [voice, f"{speed:g}", str(manner.pitch), str(manner.pitch_range)]
        samples = self._run(arguments, plain) if any(map(str.isalnum, plain)) else np.zeros(0, np.float32)
        if not (np.abs(samples) > _SILENT).any():
            raise NothingToSpeak(
                f"The text holds nothing that can be pronounced in '{language}'.",
                next_step="Give words or numbers.",
            )
        return resample(samples, espeak_process.RATE_HZ, SAMPLE_RATE_HZ)

    def _run(self, arguments: list[str], text: str) -> F32:
        try:
            done = subprocess.run(  # noqa: S603 - our own program; the text goes in as data
                [*self._command, *arguments],
                input=text.encode(),
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise SynthesisFailed(
                reason or f"espeak-ng ended with status {error.returncode}.",
                next_step="Try another wording; report it if it stays.",
            ) from error
        except (subprocess.TimeoutExpired, OSError) as error:
            raise SynthesisFailed(
                f"espeak-ng did not answer: {error}", next_step="Try again; report it if it stays."
            ) from error
        return np.frombuffer(done.stdout, np.int16).astype(np.float32) / np.float32(32_768)


def _without_controls(text: str) -> str:
    """``text`` with a space for every control character, some of which are commands to espeak-ng."""
    return "".join(" " if unicodedata.category(one) in {"Cc", "Cs"} else one for one in text)


def _setting(value: float) -> int:
    return round(min(max(value, 0.0), float(_HIGHEST_SETTING)))

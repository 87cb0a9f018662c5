"""Voices in other languages than English: the same speaker, reached from espeak-ng instead of the base voice.

A stored voice says what the speaker sounds like and how the English base voice gets there. For another
language the second half is measured anew, on espeak-ng saying a text of that language in the speaker's pitch,
when the voice is first used in it. Nothing of that is stored: voices enrolled without the extra work with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engines.calibration_texts import CALIBRATION_TEXTS
from engines.mosaic.conversion import Conversion
from engines.mosaic.enrolment import QUIET_LEVEL, Calibration, StartingPoint, level_to_speech
from engines.mosaic.espeak_speech import EspeakSpeech, Manner
from engines.mosaic.phone_features import PhoneFeatures
from engines.mosaic.profile import VoiceProfile
from engines.mosaic.recording import median_and_spread
from engines.mosaic.spectrum import F32, mel_bank
from engines.mosaic.voice_map import PreparedVoice
from engines.mosaic.waveform import Waveform, WaveformRenderer

#: Times pitch and its range are corrected; the second leaves a few per cent.
_CORRECTIONS = 2


@dataclass(frozen=True, slots=True)
class ForeignVoice:
    """A voice ready to speak one other language, and the manner in which espeak-ng has to speak for it."""

    voice: PreparedVoice
    manner: Manner


class OtherLanguages:
    """Speech of espeak-ng and what turns it into a speaker's. Stateless, so any thread may use it."""

    def __init__(self, espeak: EspeakSpeech, english: Calibration, features: PhoneFeatures) -> None:
        """``english``: the base voice that the pitch of a profile is told by."""
        self._espeak, self._english, self._features = espeak, english, features

    def speak(self, text: str, language: str, manner: Manner, speed: float) -> Waveform:
        """``text`` before conversion. Raises ``NothingToSpeak`` or ``SynthesisFailed``."""
        return Waveform.of(self._espeak.speak(text, language, manner, speed))

    def prepare(self, profile: VoiceProfile, language: str) -> ForeignVoice:
        """``profile`` for ``language``; some tenths of a second. Raises ``SynthesisFailed``."""
        manner, speech = self._in_pitch_of(profile, language)
        bank = mel_bank(profile.bandwidth_hz)
        start = StartingPoint.of(speech, profile.unit_log_mel.astype(np.float32), bank)
        quiet = replace(
            profile,
            level=QUIET_LEVEL,
            speech_floor=start.speech_floor,
            # The closing equaliser stays: climbed from another base voice, it still brings this one nearer.
            equaliser=start.equaliser,
            base_log_mel=start.base_log_mel,
            base_voiced=start.base_voiced,
        )
        samples = self._converted(speech, PreparedVoice.of(quiet, self._features))
        finished = replace(quiet, level=QUIET_LEVEL + level_to_speech(samples))
        return ForeignVoice(PreparedVoice.of(finished, self._features), manner)

    def _in_pitch_of(self, profile: VoiceProfile, language: str) -> tuple[Manner, Waveform]:
        """The manner nearest to the speaker's median and spread of F0, and the calibration text spoken so."""
        text = CALIBRATION_TEXTS[language]
        wanted_median = profile.f0_scale * self._english.f0_median + profile.f0_offset
        wanted_spread = profile.f0_scale * self._english.f0_spread
        manner = Manner.near(float(np.exp(wanted_median)))
        speech = self.speak(text, language, manner, 1.0)
        for _ in range(_CORRECTIONS):
            median, spread = median_and_spread(np.log(speech.f0_hz[speech.voiced]))
            manner = manner.moved(wanted_median - median, wanted_spread / spread)
            speech = self.speak(text, language, manner, 1.0)
        return manner, speech

    def _converted(self, speech: Waveform, voice: PreparedVoice) -> F32:
        """All of ``speech`` in ``voice``, at 24 kHz."""
        renderer = WaveformRenderer()
        gain = Conversion(speech, voice, self._features).gain(0, len(speech))
        return np.concatenate([renderer.push(speech, gain), renderer.finish()])

"""From a recording to a voice profile.

``quick_profile`` measures the speaker's pitch, spectral frames and vocal tract length. ``refined_profile``
adds the closing equaliser: the gain curve that brings the converted voice nearest to the speaker in the
eyes of the speaker encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engines.contract import Reference
from engines.mosaic.base_speech import BaseSpeech
from engines.mosaic.closing_equaliser import closing_equaliser
from engines.mosaic.conversion import Conversion, Frames
from engines.mosaic.phone_features import PhoneFeatures
from engines.mosaic.profile import VoiceProfile, with_pitch
from engines.mosaic.recording import (
    SPEECH_DB,
    SPEECH_LEVEL,
    RecordedSpeech,
    median_and_spread,
    speech_floor,
)
from engines.mosaic.renderer import render
from engines.mosaic.source_filter import Parts
from engines.mosaic.speaker_encoder import ENCODER_RATE_HZ, WINDOW_FRAMES, SpeakerEncoder, without_silence
from engines.mosaic.spectrum import (
    BINS,
    F32,
    HOP,
    SAMPLE_RATE_HZ,
    Bool,
    MelBank,
    log_energy,
    mel_bank,
    resample,
)
from engines.mosaic.voice_map import PreparedVoice
from engines.pitch import track_f0

#: What the base voice says while it is compared with a speaker.
_CALIBRATION_TEXT = (
    "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. "
    "Rice is often served in round bowls."
)
_VOCAL_TRACT_RATIOS = (0.8, 0.86, 0.92, 1.0, 1.08)
#: Speakers below this F0 are not smaller than the base voice, whatever the encoder hears in their recording:
#: a low pitch with raised formants costs most of the words.
_SMALL_SPEAKER_HZ = 160.0
#: Intonation may be flattened or exaggerated this much; more sounds acted.
_F0_SCALE_RANGE = (0.7, 1.2)
#: Long-term gains are limited to 17 dB (nepers of amplitude): the colour of a dull or narrow recording is
#: copied, but not so far that words go under.
_EQUALISER_LIMIT = 2.0
#: Level at which calibration is rendered: low enough for the renderer's limiter to stay idle.
QUIET_LEVEL = -6.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """The base voice saying the calibration text, and its pitch: median and spread of log F0."""

    parts: Parts
    f0_median: float
    f0_spread: float

    @classmethod
    def of(cls, base: BaseSpeech) -> Calibration:
        """Let ``base`` speak and listen to it; about half a second."""
        parts = base.speak_all(_CALIBRATION_TEXT)
        samples = render(parts, np.zeros(BINS, np.float32), np.random.default_rng(0))
        # Tracked as a recording is, not taken from the parts: a tracker passes over the faint ends of
        # sentences, where pitch is lowest, and would make every speaker seem to speak higher.
        f0_hz = track_f0(samples, SAMPLE_RATE_HZ)
        return cls(parts, *median_and_spread(np.log(f0_hz[f0_hz > 0])))


class Enrolment:
    """Makes profiles. Stateless after construction, so any thread may use it."""

    def __init__(
        self,
        calibration: Calibration,
        features: PhoneFeatures,
        encoder: SpeakerEncoder,
        *,
        min_speech_s: float,
        max_speech_s: float,
    ) -> None:
        self._calibration = calibration
        self._features = features
        self._encoder = encoder
        self._min_speech_s = min_speech_s
        self._max_speech_s = max_speech_s

    def quick_profile(self, reference: Reference) -> VoiceProfile:
        """The profile without the closing equaliser. Raises ``ReferenceUnusable``."""
        speech = RecordedSpeech.of(
            reference, self._encoder, min_speech_s=self._min_speech_s, max_speech_s=self._max_speech_s
        )
        f0_hz = float(np.median(speech.f0_hz[speech.f0_hz > 0]))
        candidates = [
            self._with_vocal_tract(speech, ratio)
            for ratio in _VOCAL_TRACT_RATIOS
            if ratio <= 1.0 or f0_hz > _SMALL_SPEAKER_HZ
        ]
        samples = [self._render_equalised(candidate) for candidate in candidates]
        chosen = candidates[self._most_similar(samples, speech.speaker)]
        return self._levelled(chosen)

    def refined_profile(self, profile: VoiceProfile) -> VoiceProfile:
        """``profile`` with the closing equaliser. Starts from a flat one: twice is the same as once."""
        flat = replace(profile, closing_equaliser=np.zeros(BINS, np.float32), level=QUIET_LEVEL)
        spoken = resample(self._render_converted(flat), SAMPLE_RATE_HZ, ENCODER_RATE_HZ)
        curve = closing_equaliser(self._encoder, spoken, profile.speaker, profile.bandwidth_hz)
        return self._levelled(replace(flat, closing_equaliser=curve))

    def _with_vocal_tract(self, speech: RecordedSpeech, ratio: float) -> VoiceProfile:
        """The profile of ``speech`` if the speaker's vocal tract had this ratio."""
        base = self._calibration
        log_f0 = np.log(speech.f0_hz[speech.f0_hz > 0])
        f0_median, f0_spread = median_and_spread(log_f0)
        f0_scale = float(np.clip(f0_spread / base.f0_spread, *_F0_SCALE_RANGE))
        f0_offset = f0_median - f0_scale * base.f0_median
        bank = mel_bank(speech.bandwidth_hz)
        log_mel = bank.log_mel(speech.power)
        log_mel -= log_mel.mean()
        shaped = with_pitch(base.parts, f0_scale, f0_offset).with_vocal_tract(ratio)
        start = StartingPoint.of(shaped, log_mel, bank)
        return VoiceProfile(
            f0_scale=f0_scale,
            f0_offset=f0_offset,
            vocal_tract_ratio=ratio,
            bandwidth_hz=speech.bandwidth_hz,
            level=0.0,
            speech_floor=start.speech_floor,
            equaliser=start.equaliser,
            closing_equaliser=np.zeros(BINS, np.float32),
            unit_log_mel=log_mel.astype(np.float16),
            unit_voiced=speech.f0_hz > 0,
            base_log_mel=start.base_log_mel,
            base_voiced=start.base_voiced,
            speaker=speech.speaker,
        )

    def _render_equalised(self, profile: VoiceProfile) -> F32:
        """The calibration text in the voice of ``profile`` before matching, at 24 kHz."""
        shaped = with_pitch(self._calibration.parts, profile.f0_scale, profile.f0_offset)
        shaped = shaped.with_vocal_tract(profile.vocal_tract_ratio)
        return render(shaped, profile.equaliser, np.random.default_rng(0))

    def _render_converted(self, profile: VoiceProfile) -> F32:
        """The calibration text in the voice of ``profile``, at 24 kHz."""
        voice = PreparedVoice.of(profile, self._features)
        shaped = voice.shaped(self._calibration.parts)
        gain = Conversion(shaped, voice, self._features).gain(0, len(shaped))
        return render(shaped, gain, np.random.default_rng(0))

    def _most_similar(self, recordings: list[F32], speaker: F32) -> int:
        """Which of ``recordings`` (24 kHz) the encoder takes for ``speaker``."""
        windows = [
            self._encoder.windows(
                without_silence(resample(samples, SAMPLE_RATE_HZ, ENCODER_RATE_HZ)), WINDOW_FRAMES
            )
            for samples in recordings
        ]
        # One run over all windows is much faster than one run per recording.
        embeddings = self._encoder.embed_windows(np.concatenate(windows))
        ends = np.cumsum([len(window) for window in windows])[:-1]
        means = [group.mean(axis=0) for group in np.split(embeddings, ends)]
        return int(np.argmax([mean @ speaker / np.linalg.norm(mean) for mean in means]))

    def _levelled(self, profile: VoiceProfile) -> VoiceProfile:
        """``profile`` with the level that brings its speech to ``SPEECH_LEVEL``."""
        samples = self._render_converted(replace(profile, level=QUIET_LEVEL))
        return replace(profile, level=QUIET_LEVEL + level_to_speech(samples))


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """What of a profile depends on the base voice: its fields of the same names, before matching."""

    speech_floor: float
    equaliser: F32
    base_log_mel: NDArray[np.float16]
    base_voiced: Bool

    @classmethod
    def of(cls, base: Frames, speaker_log_mel: F32, bank: MelBank) -> StartingPoint:
        """Measured on ``base``, the base voice in the speaker's pitch, against frames of the speaker."""
        power = base.power()
        energy = log_energy(power)
        floor = speech_floor(energy)
        spoken = energy > floor
        base_log_mel = bank.log_mel(power[spoken])
        gain = 0.5 * (speaker_log_mel.mean(axis=0) - base_log_mel.mean(axis=0))
        gain = np.clip(gain - gain.mean(), -_EQUALISER_LIMIT, _EQUALISER_LIMIT)
        return cls(
            floor,
            gain @ bank.synthesis,
            (base_log_mel + 2 * gain).astype(np.float16),
            base.voiced[spoken],
        )


def level_to_speech(samples: F32) -> float:
    """Log gain that brings the speech in ``samples`` [n] at 24 kHz to ``SPEECH_LEVEL``."""
    blocks = samples[: len(samples) // HOP * HOP].reshape(-1, HOP)
    mean_square = (blocks.astype(np.float64) ** 2).mean(axis=1)
    active = mean_square > mean_square.max() * 10 ** (SPEECH_DB / 10)
    return float(np.log(SPEECH_LEVEL / np.sqrt(mean_square[active].mean())))

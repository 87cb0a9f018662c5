"""What a reference recording says about its speaker, and when it says nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.contract import Reference, ReferenceUnusable
from engines.mosaic.speaker_encoder import ENCODER_RATE_HZ, SpeakerEncoder, without_silence
from engines.mosaic.spectrum import (
    BIN_HZ,
    F32,
    FRAMES_PER_S,
    SAMPLE_RATE_HZ,
    log_energy,
    log_power,
    mel_bank,
    resample,
)
from engines.mosaic.waveform import Waveform
from engines.pitch import track_f0

#: Root mean square to which recordings and the finished voice are brought.
SPEECH_LEVEL = 0.06
#: Frames this far below the loudest are not speech.
SPEECH_DB = -35.0

_SILENT_RMS = 1e-4
_FEWEST_VOICED_S = 0.4
#: Speech spectra vary by about 1.5 nepers per band; tones and steady noise by a fraction of one.
_LEAST_VARIATION = 0.6
#: Spread of log F0; a monotonous speaker has ten times this.
_LEAST_F0_SPREAD = 0.004


@dataclass(frozen=True, slots=True)
class RecordedSpeech:
    """Speech frames of a recording: power [frames, BINS], F0 [frames] (0 is unvoiced), embedding [256]."""

    power: F32
    f0_hz: F32
    bandwidth_hz: float
    speaker: F32

    @classmethod
    def of(
        cls, reference: Reference, encoder: SpeakerEncoder, *, min_speech_s: float, max_speech_s: float
    ) -> RecordedSpeech:
        """Analyse the first ``max_speech_s`` of ``reference``. Raises ``ReferenceUnusable``."""
        samples = _checked(reference, min_speech_s, max_speech_s)
        f0_hz = track_f0(samples, reference.sample_rate_hz)
        frames = Waveform.framed(resample(samples, reference.sample_rate_hz, SAMPLE_RATE_HZ), f0_hz)
        f0_hz, power = frames.f0_hz, frames.power()
        energy = log_energy(power)
        speech = energy > speech_floor(energy)
        _check_speech(power[speech], f0_hz[speech], min_speech_s)
        bandwidth_hz = min(_bandwidth_hz(power[speech]), 0.475 * reference.sample_rate_hz)
        narrow = resample(samples, reference.sample_rate_hz, ENCODER_RATE_HZ)
        return cls(
            power[speech],
            f0_hz[speech],
            float(round(bandwidth_hz, -2)),
            encoder.embed(without_silence(narrow)),
        )


def median_and_spread(log_f0: F32) -> tuple[float, float]:
    """Median, and distance between the 16th and the 84th percentile."""
    low, median, high = np.percentile(log_f0, [16, 50, 84])
    return float(median), float(high - low)


def speech_floor(energy: F32) -> float:
    """Log energy 35 dB below the loudest of ``energy`` [frames]: what is above it counts as speech."""
    return float(np.percentile(energy, 97) + log_power(SPEECH_DB))


def _checked(reference: Reference, min_speech_s: float, max_speech_s: float) -> F32:
    """The samples used, at speech level."""
    if reference.duration_s < min_speech_s:
        raise ReferenceUnusable(
            f"The recording lasts {reference.duration_s:.1f} s.",
            next_step=f"Record at least {min_speech_s:g} s of speech; 8 to 15 s are best.",
        )
    samples = _from_first_sound(reference.samples, reference.sample_rate_hz)
    samples = samples[: int(max_speech_s * reference.sample_rate_hz)]
    rms = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2))) if len(samples) else 0.0
    if not rms > _SILENT_RMS:
        raise ReferenceUnusable(
            "The recording is silent.", next_step="Check the microphone and record again."
        )
    return samples * np.float32(SPEECH_LEVEL / rms)


def _check_speech(power: F32, f0_hz: F32, min_speech_s: float) -> None:
    """Raise ``ReferenceUnusable`` unless these frames are enough speech."""
    speech_s = len(power) / FRAMES_PER_S
    if speech_s < min_speech_s:
        raise ReferenceUnusable(
            f"The recording holds only {speech_s:.1f} s of speech.",
            next_step=f"Record at least {min_speech_s:g} s of speech; 8 to 15 s are best.",
        )
    voiced_f0_hz = f0_hz[f0_hz > 0]
    if len(voiced_f0_hz) < _FEWEST_VOICED_S * FRAMES_PER_S:
        raise ReferenceUnusable(
            "No voice is heard in the recording.",
            next_step="Record one person speaking normally, without music, near the microphone.",
        )
    variation = float(mel_bank(3000.0).log_mel(power).std(axis=0).mean())
    _, f0_spread = median_and_spread(np.log(voiced_f0_hz))
    if variation < _LEAST_VARIATION or f0_spread < _LEAST_F0_SPREAD:
        raise ReferenceUnusable(
            "The recording holds a steady sound, not speech.",
            next_step="Record one person speaking normally, without music, near the microphone.",
        )


def _from_first_sound(samples: F32, sample_rate_hz: int) -> F32:
    """``samples`` without the silence before the first sound."""
    block = sample_rate_hz // 100
    level = np.abs(samples[: len(samples) // block * block]).reshape(-1, block).max(axis=1)
    audible = np.flatnonzero(level > 10 ** (SPEECH_DB / 20) * level.max(initial=0.0))
    return samples[int(audible[0]) * block :] if len(audible) else samples[:0]


def _bandwidth_hz(power: F32) -> float:
    """Where the mean spectrum of speech frames [frames, BINS] ends, 3 to 8 kHz."""
    level_db = 10 * np.log10(power.mean(axis=0) + 1e-12)
    smooth_db = np.convolve(level_db, np.ones(9) / 9, "same")
    present = np.flatnonzero(smooth_db > smooth_db[10:100].max() - 58.0)
    return float(np.clip(present[-1] * BIN_HZ - 200.0, 3000.0, 8000.0))

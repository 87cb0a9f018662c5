"""Sounds for tests: cheap synthetic voices, and reading audio back."""

from __future__ import annotations

import io

import numpy as np
import soundfile

from engines.contract import Samples


def noisy_tone(pitch_hz: float, seconds: float = 3.0, rate_hz: int = 24_000) -> Samples:
    """A buzz with vowel-like formants that move, enough like a voice for engines that only measure.

    Shape [seconds * rate_hz], float32, peak 0.5.
    """
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    pitch = pitch_hz * (1 + 0.08 * np.sin(2 * np.pi * 0.9 * time_s))
    phase = 2 * np.pi * np.cumsum(pitch) / rate_hz
    buzz = np.zeros_like(time_s)
    for order in range(1, int(min(5000, rate_hz / 2.5) / pitch_hz)):
        frequency = order * pitch
        first = 500 + 250 * np.sin(2 * np.pi * 1.7 * time_s)
        second = 1500 + 500 * np.sin(2 * np.pi * 1.1 * time_s + 1)
        gain = 1 / (1 + ((frequency - first) / 120) ** 2) + 0.5 / (1 + ((frequency - second) / 160) ** 2)
        buzz += gain * np.sin(order * phase)
    syllables = np.clip(np.sin(2 * np.pi * 2.3 * time_s) + 0.6, 0.02, 1)
    noise = np.random.default_rng(round(pitch_hz)).normal(0, 0.003, len(time_s))
    sound = buzz * syllables
    samples: Samples = (0.5 * sound / np.abs(sound).max() + noise).astype(np.float32)
    return samples


def wav_bytes(samples: Samples, rate_hz: int = 24_000) -> bytes:
    """``samples`` as a 16-bit WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="WAV")
    return file.getvalue()


def read_audio(data: bytes) -> tuple[Samples, int]:
    """Samples [n] float32 and rate of an encoded file."""
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32")
    return np.asarray(samples, np.float32), int(rate_hz)

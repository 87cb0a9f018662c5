"""The frame grid and the spectral measures every other module shares.

One frame is 12.5 ms. Spectra have 601 bins of 20 Hz, 0 to 12 kHz; they come from a 1200-point window at
24 kHz, the grid of the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

SAMPLE_RATE_HZ = 24_000
HOP = 300
WINDOW = 1200
BINS = WINDOW // 2 + 1
BIN_HZ = SAMPLE_RATE_HZ / WINDOW
FRAMES_PER_S = SAMPLE_RATE_HZ / HOP
#: Centre frequency of every bin, shape [BINS].
BIN_CENTRES_HZ: F32 = (np.arange(BINS) * BIN_HZ).astype(np.float32)
#: Periodic Hann window, shape [WINDOW].
HANN: F32 = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)

MEL_BANDS = 60
LOWEST_MEL_HZ = 60.0
CEPSTRA = 16
#: Added to band powers before the logarithm; far below the quietest speech on this scale.
POWER_FLOOR = 1e-7


def resample(samples: F32, from_hz: int, to_hz: int) -> F32:
    """``samples`` [n] at another rate."""
    if from_hz == to_hz:
        return samples
    resampled: F32 = soxr.resample(samples, from_hz, to_hz)
    return resampled


def hz_to_mel(frequency_hz: float | F32) -> F64:
    """HTK mel scale."""
    return np.asarray(2595.0 * np.log10(1.0 + np.asarray(frequency_hz, np.float64) / 700.0))


def mel_to_hz(mel: float | F64) -> F64:
    """Inverse of ``hz_to_mel``."""
    return np.asarray(700.0 * (10.0 ** (np.asarray(mel, np.float64) / 2595.0) - 1.0))


def interpolation_matrix(knots_hz: F64, at_hz: F32) -> F32:
    """Matrix [knots, len(at_hz)] that turns values at ``knots_hz`` into values at ``at_hz``, linearly.

    Outside the knots the nearest one is held.
    """
    identity = np.eye(len(knots_hz))
    return np.array([np.interp(at_hz, knots_hz, row) for row in identity], np.float32)


@dataclass(frozen=True, slots=True)
class MelBank:
    """Mel bands up to the bandwidth of a recording, and the way back to bins.

    ``analysis`` [BINS, MEL_BANDS]: power spectrum -> band power (columns sum to one);
    ``synthesis`` [MEL_BANDS, BINS]: band gains -> bin gains.
    """

    analysis: F32
    synthesis: F32

    def log_mel(self, power: F32) -> F32:
        """Natural log of band powers, [frames, MEL_BANDS], from ``power`` [frames, BINS]."""
        log_bands: F32 = np.log(power @ self.analysis + np.float32(POWER_FLOOR))
        return log_bands


@lru_cache(maxsize=64)
def mel_bank(bandwidth_hz: float) -> MelBank:
    """Triangular bands from 60 Hz to ``bandwidth_hz``; none narrower than 60 Hz to either side."""
    edges_hz = mel_to_hz(np.linspace(hz_to_mel(LOWEST_MEL_HZ), hz_to_mel(bandwidth_hz), MEL_BANDS + 2))
    centres_hz = edges_hz[1:-1]
    # Narrower triangles would see single harmonics of a high voice instead of its envelope.
    low_hz = np.minimum(edges_hz[:-2], centres_hz - 60.0)[:, None]
    high_hz = np.maximum(edges_hz[2:], centres_hz + 60.0)[:, None]
    rising = (BIN_CENTRES_HZ - low_hz) / (centres_hz[:, None] - low_hz)
    falling = (high_hz - BIN_CENTRES_HZ) / (high_hz - centres_hz[:, None])
    triangles = np.clip(np.minimum(rising, falling), 0.0, None)
    triangles /= triangles.sum(axis=1, keepdims=True)
    analysis = np.ascontiguousarray(triangles.T, np.float32)
    return MelBank(analysis, interpolation_matrix(centres_hz, BIN_CENTRES_HZ))


@lru_cache(maxsize=1)
def _cosines() -> F32:
    """DCT-II [MEL_BANDS, CEPSTRA] without the constant term: cepstra say nothing about loudness."""
    band = np.arange(MEL_BANDS)[:, None] + 0.5
    order = np.arange(1, CEPSTRA + 1)[None]
    cosines: F32 = np.cos(np.pi * order * band / MEL_BANDS).astype(np.float32)
    return cosines * np.float32(np.sqrt(2 / MEL_BANDS))


def cepstra(log_mel: F32) -> F32:
    """Mel cepstra 1 to 16, [frames, CEPSTRA], from ``log_mel`` [frames, MEL_BANDS]."""
    return log_mel @ _cosines()


def log_energy(power: F32) -> F32:
    """Natural log of the frame's total power, [frames], from ``power`` [frames, BINS]."""
    energy: F32 = np.log(power.sum(axis=1) + np.float32(POWER_FLOOR))
    return energy


def log_power(level_db: float) -> float:
    """A power ratio in decibels as a natural log."""
    return float(level_db * np.log(10.0) / 10.0)

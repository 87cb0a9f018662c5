"""Parts and gains to samples, block by block.

The sums are those of ``hibari/dsp.py`` (pulse train, short-time spectrum, inverse, overlap-add), taken a few
frames at a time: samples leave as soon as no later frame adds to them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.mosaic.source_filter import VOICED_ABOVE_HZ, Parts, magnitude
from engines.mosaic.spectrum import BINS, F32, HANN, HOP, SAMPLE_RATE_HZ, WINDOW

C64 = NDArray[np.complex64]

_OVERLAP = WINDOW // HOP
#: Sum of the squared windows that overlap at any sample.
_WINDOW_GAIN = float((HANN**2).reshape(_OVERLAP, HOP).sum(axis=0)[0])
#: Brings a cosine of amplitude one to magnitude one in the spectrum.
_EXCITATION_WINDOW: F32 = HANN / np.float32(WINDOW / 4)
#: Harmonics above this are left to the noise.
_HIGHEST_HARMONIC_HZ = 11_000.0
#: Samples above this are bent towards one instead of being cut off.
_KNEE = np.float32(0.8)


class OverlapAdd:
    """Short-time spectra to samples. ``push`` the spectra of one piece in order, then ``finish``."""

    def __init__(self) -> None:
        self._tail = np.zeros((_OVERLAP - 1, HOP), np.float32)
        # The window of frame 0 is centred on sample 0: its first half lies before the beginning.
        self._skip = WINDOW // 2

    def push(self, spectra: C64) -> F32:
        """Samples complete once ``spectra`` [frames, BINS], the next frames, are in."""
        count = len(spectra)
        frames = np.fft.irfft(spectra, WINDOW, axis=1) * HANN
        steps = frames.reshape(count, _OVERLAP, HOP)
        summed = np.zeros((count + _OVERLAP - 1, HOP), np.float32)
        summed[: _OVERLAP - 1] = self._tail
        for step in range(_OVERLAP):
            summed[step : step + count] += steps[:, step]
        self._tail = summed[count:].copy()
        return self._leave(summed[:count])

    def finish(self) -> F32:
        """The samples still held back."""
        return self._leave(self._tail[: WINDOW // 2 // HOP])

    def _leave(self, complete: F32) -> F32:
        samples = complete.reshape(-1) / np.float32(_WINDOW_GAIN)
        skipped = min(self._skip, len(samples))
        self._skip -= skipped
        return soft_limited(samples[skipped:])


class Renderer:
    """Renders one piece of speech. ``push`` its frames in order, then ``finish``."""

    def __init__(self, f0_hz: F32, noise: np.random.Generator) -> None:
        """``f0_hz`` [frames] of the whole piece; ``noise`` is drawn from frame by frame, in order."""
        excitation = np.pad(pulse_train(f0_hz), WINDOW // 2)
        self._excitation = np.lib.stride_tricks.sliding_window_view(excitation, WINDOW)[::HOP]
        self._noise = noise
        self._position = 0
        self._output = OverlapAdd()

    def push(self, parts: Parts, log_gain: F32) -> F32:
        """Samples complete once ``parts``, the next frames, are in; ``log_gain`` is [frames, BINS]."""
        samples = self._output.push(self._spectra(parts) * np.exp(log_gain))
        self._position += len(parts)
        return samples

    def finish(self) -> F32:
        """The samples still held back."""
        return self._output.finish()

    def _spectra(self, parts: Parts) -> C64:
        start = self._position
        windowed = self._excitation[start : start + len(parts)] * _EXCITATION_WINDOW
        pulses = np.fft.rfft(windowed, axis=1).astype(np.complex64, copy=False)
        noise = self._noise.standard_normal((len(parts), 2 * BINS), dtype=np.float32).view(np.complex64)
        spectra: C64 = pulses * _polar(parts.harmonic, parts.harmonic_phase)
        spectra += noise * magnitude(parts.noise)
        spectra += _polar(parts.residual, parts.residual_phase)
        return spectra


def render(parts: Parts, log_gain: F32, noise: np.random.Generator) -> F32:
    """All of ``parts`` at once, ``len(parts) * HOP`` samples; ``log_gain`` is [frames, BINS] or [BINS]."""
    renderer = Renderer(parts.f0_hz, noise)
    return np.concatenate([renderer.push(parts, log_gain), renderer.finish()])


def soft_limited(samples: F32) -> F32:
    """``samples`` with peaks bent to stay below one; nothing changes up to 0.8."""
    excess = np.abs(samples) - _KNEE
    if not (excess > 0).any():
        return samples
    room = np.float32(1.0) - _KNEE
    bent: F32 = np.where(excess > 0, np.sign(samples) * (_KNEE + room * np.tanh(excess / room)), samples)
    return bent


def pulse_train(f0_hz: F32) -> F32:
    """Every harmonic of ``f0_hz`` [frames] below 11 kHz at unit amplitude, [frames * HOP]; unvoiced is zero.

    Uses the closed form  ``sum_{h<=H} cos(h t) = sin((H + 1/2) t) / (2 sin(t/2)) - 1/2``.
    """
    frame = np.arange(len(f0_hz))
    at = (np.arange(len(f0_hz) * HOP) + 0.5) / HOP - 0.5
    f0_curve = np.interp(at, frame, f0_hz)
    voiced = f0_curve > VOICED_ABOVE_HZ
    f0_curve = np.maximum(f0_curve, VOICED_ABOVE_HZ)
    phase = (2 * np.pi * np.modf(np.cumsum(f0_curve) / SAMPLE_RATE_HZ)[0]).astype(np.float32)
    half_harmonics = (np.floor(_HIGHEST_HARMONIC_HZ / f0_curve) + 0.5).astype(np.float32)
    divisor = 2 * np.sin(phase * 0.5)
    at_pulse = np.abs(divisor) <= 2e-3
    pulses = np.sin(half_harmonics * phase) / np.where(at_pulse, 1.0, divisor)
    pulses = np.where(at_pulse, half_harmonics, pulses) - 0.5
    return np.where(voiced, pulses, 0.0).astype(np.float32)


def _polar(log_magnitude: F32, phase: F32) -> C64:
    spectrum = np.empty(phase.shape, np.complex64)
    linear = magnitude(log_magnitude)
    np.multiply(np.cos(phase), linear, out=spectrum.real)
    np.multiply(np.sin(phase), linear, out=spectrum.imag)
    return spectrum

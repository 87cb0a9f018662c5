"""Speech that exists as samples, in the frames everything else works on.

Recordings are measured this way, and so is speech of a base voice that gives samples instead of parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.mosaic.renderer import C64, OverlapAdd
from engines.mosaic.spectrum import BIN_HZ, BINS, F32, F64, HANN, HOP, SAMPLE_RATE_HZ, WINDOW, Bool
from engines.pitch import track_f0

#: Where there is no F0, spectra are averaged over this.
_UNVOICED_WIDTH_HZ = 150.0


@dataclass(frozen=True, slots=True)
class Waveform:
    """Some frames of speech: ``windows`` [frames, WINDOW] of samples at 24 kHz, ``f0_hz`` [frames].

    An F0 of 0 is unvoiced.
    """

    windows: F32
    f0_hz: F32

    @classmethod
    def of(cls, samples: F32) -> Waveform:
        """Frames of ``samples`` [n] at 24 kHz, pitch tracked; frame 0 is centred on the first sample."""
        return cls.framed(samples, track_f0(samples, SAMPLE_RATE_HZ))

    @classmethod
    def framed(cls, samples: F32, f0_hz: F32) -> Waveform:
        """Frames of ``samples`` [n] at 24 kHz whose pitch is known."""
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, WINDOW // 2), WINDOW)[::HOP]
        count = min(len(windows), len(f0_hz))
        return cls(windows[:count], f0_hz[:count])

    def __len__(self) -> int:
        return len(self.f0_hz)

    @property
    def voiced(self) -> Bool:
        """Which frames have a pitch, [frames]."""
        return self.f0_hz > 0

    def between(self, start: int, stop: int) -> Waveform:
        """Frames ``start`` to ``stop``, as views."""
        return Waveform(self.windows[start:stop], self.f0_hz[start:stop])

    def spectra(self) -> C64:
        """Short-time spectra [frames, BINS]."""
        spectra: C64 = np.fft.rfft(self.windows * HANN, axis=1).astype(np.complex64, copy=False)
        return spectra

    def power(self) -> F32:
        """Power spectra [frames, BINS] averaged over one F0, which hides the harmonics."""
        spectra = np.fft.rfft(self.windows * HANN, axis=1)
        power = spectra.real.astype(np.float64) ** 2 + spectra.imag.astype(np.float64) ** 2
        width_hz = np.where(self.f0_hz > 0, self.f0_hz, _UNVOICED_WIDTH_HZ)
        half_width = 0.5 * width_hz[:, None] / BIN_HZ
        running = np.cumsum(np.pad(power, ((0, 0), (1, 0))), axis=1)
        centre = np.arange(BINS)[None] + 0.5
        low, high = np.clip(centre - half_width, 0, BINS), np.clip(centre + half_width, 0, BINS)
        smooth = (_at(running, high) - _at(running, low)) / (high - low)
        return smooth.astype(np.float32)


class WaveformRenderer:
    """Renders one waveform, block by block. ``push`` its frames in order, then ``finish``."""

    def __init__(self) -> None:
        self._output = OverlapAdd()

    def push(self, frames: Waveform, log_gain: F32) -> F32:
        """Samples complete once ``frames``, the next ones, are in; ``log_gain`` is [frames, BINS]."""
        return self._output.push(frames.spectra() * np.exp(log_gain))

    def finish(self) -> F32:
        """The samples still held back."""
        return self._output.finish()


def _at(rows: F64, positions: F64) -> F64:
    """Each of ``rows`` at fractional ``positions``, linearly interpolated."""
    low = np.minimum(positions.astype(np.intp), rows.shape[1] - 2)
    fraction = positions - low
    value: F64 = (
        np.take_along_axis(rows, low, 1) * (1 - fraction) + np.take_along_axis(rows, low + 1, 1) * fraction
    )
    return value

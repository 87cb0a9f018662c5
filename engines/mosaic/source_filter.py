"""Speech as the base model describes it: a pulse train and noise, each with a spectrum per frame.

The waveform is  ``S = e^harmonic e^(i phase) STFT(pulses(f0)) + e^noise Z + e^residual e^(i phase')``  with
white noise Z (hibari-tts 0.2.1, ``hibari/dsp.py``). Voice conversion edits these parts before they are
rendered, so no recording is ever taken apart and no vocoder is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.mosaic.spectrum import BIN_CENTRES_HZ, BIN_HZ, BINS, F32, SAMPLE_RATE_HZ, Bool

#: F0 below this means "unvoiced" in the base model's output.
VOICED_ABOVE_HZ = 40.0
#: Log-magnitudes are cut here, as the base model's own renderer does.
_LOG_MAGNITUDE_LIMIT = np.float32(7.0)
#: A harmonic of magnitude one every f0 Hz has the power density of this many units over f0.
_HARMONIC_DENSITY_HZ = 30.0
_ALL_BINS = slice(None)
#: Up to 4 kHz, as far as the pitch tracker listens to recordings; every fourth bin is enough for a sum.
_VOICING_BINS = slice(2, 200, 4)
#: The frequency axis is scaled up to here and squeezed above, so that 12 kHz stays 12 kHz.
_WARP_EDGE_HZ = 8000.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Some frames of speech. Arrays are [frames, BINS] unless noted; magnitudes are natural logs."""

    harmonic: F32
    harmonic_phase: F32
    noise: F32
    residual: F32
    residual_phase: F32
    #: [frames]; at or below ``VOICED_ABOVE_HZ`` the frame is unvoiced.
    f0_hz: F32

    def __len__(self) -> int:
        return len(self.f0_hz)

    @property
    def pitched(self) -> Bool:
        """Which frames have a pulse train, however faint, [frames]."""
        return self.f0_hz > VOICED_ABOVE_HZ

    @property
    def voiced(self) -> Bool:
        """Which frames a listener takes for voiced, [frames]: harmonics hold most of the power below 4 kHz.

        Not the same as ``pitched``: the base model runs its pitch curve through most voiceless consonants
        and takes the harmonics out of them.
        """
        harmonic: F32 = self._harmonic_power(_VOICING_BINS).sum(axis=1)
        noise: F32 = self._noise_power(_VOICING_BINS).sum(axis=1)
        return harmonic > noise

    def between(self, start: int, stop: int) -> Parts:
        """Frames ``start`` to ``stop``, as views."""
        return Parts(
            self.harmonic[start:stop],
            self.harmonic_phase[start:stop],
            self.noise[start:stop],
            self.residual[start:stop],
            self.residual_phase[start:stop],
            self.f0_hz[start:stop],
        )

    def power(self) -> F32:
        """Expected power spectrum [frames, BINS], harmonics spread evenly between each other."""
        return self._harmonic_power(_ALL_BINS) + self._noise_power(_ALL_BINS)

    def with_vocal_tract(self, ratio: float) -> Parts:
        """Formants at ``ratio`` times their frequency; below 1 is a longer vocal tract, a larger speaker."""
        if ratio == 1.0:
            return self
        source = _warp_source_bins(ratio)
        low = source.astype(np.intp)
        fraction = (source - low).astype(np.float32)
        nearest = np.round(source).astype(np.intp)

        def moved(log_magnitude: F32) -> F32:
            return log_magnitude[:, low] * (1 - fraction) + log_magnitude[:, low + 1] * fraction

        return replace(
            self,
            harmonic=moved(self.harmonic),
            # Phases are not averaged: the mean of two unrelated angles is a third one.
            harmonic_phase=self.harmonic_phase[:, nearest],
            noise=moved(self.noise),
            residual=moved(self.residual),
        )

    def at_rate(self, rate: float) -> Parts:
        """The same speech ``rate`` times as fast: frames are left out or repeated, pitch stays."""
        if rate == 1.0 or not len(self):
            return self
        count = max(1, round(len(self) / rate))
        nearest = np.minimum((np.arange(count) * rate).astype(np.intp), len(self) - 1)
        return Parts(
            self.harmonic[nearest],
            self.harmonic_phase[nearest],
            self.noise[nearest],
            self.residual[nearest],
            self.residual_phase[nearest],
            self.f0_hz[nearest],
        )

    def _harmonic_power(self, bins: slice) -> F32:
        density = np.where(self.pitched, _HARMONIC_DENSITY_HZ / np.maximum(self.f0_hz, VOICED_ABOVE_HZ), 0.0)
        power: F32 = magnitude(self.harmonic[:, bins]) ** 2 * density[:, None].astype(np.float32)
        return power

    def _noise_power(self, bins: slice) -> F32:
        power: F32 = 2.0 * magnitude(self.noise[:, bins]) ** 2 + magnitude(self.residual[:, bins]) ** 2
        return power


def joined(pieces: Sequence[Parts]) -> Parts:
    """``pieces`` one after the other."""
    return Parts(
        np.concatenate([piece.harmonic for piece in pieces]),
        np.concatenate([piece.harmonic_phase for piece in pieces]),
        np.concatenate([piece.noise for piece in pieces]),
        np.concatenate([piece.residual for piece in pieces]),
        np.concatenate([piece.residual_phase for piece in pieces]),
        np.concatenate([piece.f0_hz for piece in pieces]),
    )


def magnitude(log_magnitude: F32) -> F32:
    """Linear magnitude, limited as the base model's renderer limits it."""
    linear: F32 = np.exp(np.minimum(log_magnitude, _LOG_MAGNITUDE_LIMIT))
    return linear


def _warp_source_bins(ratio: float) -> F32:
    """For every bin of the warped spectrum the (fractional) bin it comes from, [BINS]."""
    nyquist_hz = SAMPLE_RATE_HZ / 2
    edge_hz = _WARP_EDGE_HZ * min(ratio, 1.0)
    source_edge_hz = edge_hz / ratio
    below = BIN_CENTRES_HZ / ratio
    slope = (nyquist_hz - source_edge_hz) / (nyquist_hz - edge_hz)
    above = source_edge_hz + (BIN_CENTRES_HZ - edge_hz) * slope
    source_hz = np.where(edge_hz < BIN_CENTRES_HZ, above, below)
    clipped: F32 = np.clip(source_hz / BIN_HZ, 0, BINS - 1 - 1e-3).astype(np.float32)
    return clipped

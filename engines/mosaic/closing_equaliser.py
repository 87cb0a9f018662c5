"""The gain curve that brings a converted voice nearest to its speaker in the eyes of the speaker encoder.

Gradient ascent (Adam: D. Kingma and J. Ba, 2015) on the encoder's cosine. A gain acts on power spectra, mel
bands are sums of those, so the gradient at the encoder's input reaches the curve through two matrices.
"""

from __future__ import annotations

import numpy as np

from engines.mosaic.speaker_encoder import (
    ENCODER_BINS,
    ENCODER_RATE_HZ,
    SpeakerEncoder,
    cut_windows,
    level_factor,
    without_silence,
)
from engines.mosaic.spectrum import BIN_CENTRES_HZ, F32, hz_to_mel, interpolation_matrix, mel_to_hz

_STEPS = 25
_KNOTS = 24
#: Step size in nepers of amplitude.
_RATE = 0.15
_HOP_FRAMES = 120
_CURVATURE_COST = 0.04
_SIZE_COST = 0.02
#: The curve is kept within 13 dB (nepers of amplitude): what the encoder likes beyond that, ears do not.
_LIMIT = 1.5


def closing_equaliser(encoder: SpeakerEncoder, spoken: F32, speaker: F32, bandwidth_hz: float) -> F32:
    """Log amplitude gain [BINS] that brings ``spoken`` (16 kHz) nearer to the embedding ``speaker`` [256]."""
    power = cut_windows(encoder.power(without_silence(spoken)), _HOP_FRAMES)
    return _Climb(encoder, power, speaker, bandwidth_hz).run()


class _Climb:
    """Gradient ascent on the encoder's cosine over a gain curve of mel-spaced knots (Adam)."""

    def __init__(self, encoder: SpeakerEncoder, power: F32, speaker: F32, bandwidth_hz: float) -> None:
        """``power`` [windows, time, ENCODER_BINS] of the converted voice."""
        self._encoder, self._power, self._speaker = encoder, power, speaker
        highest_hz = min(ENCODER_RATE_HZ / 2, bandwidth_hz + 400.0)
        self._knots_hz = mel_to_hz(np.linspace(hz_to_mel(60.0), hz_to_mel(highest_hz), _KNOTS))
        bins_hz = np.linspace(0, ENCODER_RATE_HZ / 2, ENCODER_BINS, dtype=np.float32)
        self._basis = interpolation_matrix(self._knots_hz, bins_hz)

    def run(self) -> F32:
        """The best curve found as log amplitude gain [BINS]."""
        knots = np.zeros(_KNOTS, np.float32)
        momentum = np.zeros_like(knots)
        scale = np.zeros_like(knots)
        for step in range(1, _STEPS + 1):
            downhill = _regularisation(knots) - self._gradient(knots)
            momentum = 0.9 * momentum + 0.1 * downhill
            scale = 0.99 * scale + 0.01 * downhill**2
            unbiased = momentum / (1 - 0.9**step)
            knots = knots - _RATE * unbiased / (np.sqrt(scale / (1 - 0.99**step)) + 1e-8)
            knots = np.clip(knots - knots.mean(), -_LIMIT, _LIMIT)
        return np.interp(BIN_CENTRES_HZ, self._knots_hz, knots).astype(np.float32)

    def _gradient(self, knots: F32) -> F32:
        """Of the cosine with respect to ``knots``; the encoder's levelling is differentiated too."""
        power = self._power * np.exp(2 * knots @ self._basis)
        flat = power.reshape(-1, ENCODER_BINS)
        level = level_factor(flat)
        mel = (power @ self._encoder.mel_basis) * np.float32(level)
        _, at_mel = self._encoder.cosine_and_gradient(mel, self._speaker)
        at_power = (at_mel.reshape(-1, at_mel.shape[-1]) @ self._encoder.mel_basis.T) * np.float32(level)
        # d level / d power: the level is inversely proportional to the summed power.
        at_power -= np.float32((at_mel * mel).sum() / flat.sum())
        gradient: F32 = self._basis @ (2 * (at_power * flat).sum(axis=0))
        return gradient


def _regularisation(knots: F32) -> F32:
    """Gradient of the cost of a bent and of a large gain curve."""
    bend = np.diff(knots, 2)
    gradient = np.zeros_like(knots)
    gradient[2:] += bend
    gradient[1:-1] -= 2 * bend
    gradient[:-2] += bend
    weighted = _CURVATURE_COST / len(bend) * gradient + _SIZE_COST / len(knots) * knots
    return weighted.astype(np.float32)

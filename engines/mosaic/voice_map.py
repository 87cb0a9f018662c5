"""Where each sound of the base voice has to move to become the speaker's.

Frames are looked up by voicing: the nearest (in ``phone_features``) among the speaker's. A frame moves the
larger part of the way to their mean envelope. This is the frame-wise k-nearest-neighbour conversion of
M. Baas et al., "Voice Conversion With Just Nearest Neighbors" (Interspeech 2023), with mel spectra for learnt
features, and with a share of the frame itself kept, in which its words are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.mosaic.phone_features import CepstralNorm, PhoneFeatures, padded
from engines.mosaic.profile import VoiceProfile, with_pitch
from engines.mosaic.source_filter import Parts
from engines.mosaic.spectrum import F32, MelBank, cepstra, mel_bank

_NEIGHBOURS = 3
#: How much of the way to its neighbours a frame moves: all of it costs words, of unvoiced frames sooner.
_VOICED_SHARE = 0.8
_UNVOICED_SHARE = 0.6
#: Fewer frames than this say nothing about a voicing.
_FEWEST_UNITS = 20
#: Spread of the Gaussian that smooths moves over time: without it each frame would jump on its own.
_SMOOTHING_FRAMES = 1.4
#: Frames the smoothing takes from either side.
SMOOTHING_REACH = 4


def _smoothing_kernel() -> F32:
    offset = np.arange(-SMOOTHING_REACH, SMOOTHING_REACH + 1)
    kernel = np.exp(-(offset**2) / (2 * _SMOOTHING_FRAMES**2))
    normalised: F32 = (kernel / kernel.sum()).astype(np.float32)
    return normalised


_KERNEL = _smoothing_kernel()


@dataclass(frozen=True, slots=True)
class VoicingMap:
    """Voiced or unvoiced frames of the speaker, and how far frames of that voicing move towards them."""

    #: Matching vectors [units, n] and their squared lengths [units].
    vectors: F32
    squared_lengths: F32
    #: Spectral shapes [units, MEL_BANDS]: log-mel spectra without loudness.
    shapes: F32
    share: float

    @classmethod
    def of(cls, vectors: F32, shapes: F32, share: float) -> VoicingMap:
        """Map onto the units with these rows."""
        return cls(vectors, (vectors**2).sum(axis=1), shapes, share)

    def moves(self, vectors: F32, shapes: F32) -> F32:
        """Log-mel moves [n, MEL_BANDS] of frames with matching ``vectors`` [n, size] and ``shapes``.

        Shapes have no loudness, so moves have mean zero: loudness over time stays the sentence's. All zero
        if the recording has too few frames of this voicing to say anything.
        """
        if not len(vectors) or len(self.vectors) < _FEWEST_UNITS:
            return np.zeros_like(shapes)
        distances = self.squared_lengths - 2 * vectors @ self.vectors.T
        nearest = np.argpartition(distances, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
        towards: F32 = (self.shapes[nearest].mean(axis=1) - shapes) * np.float32(self.share)
        return towards


@dataclass(frozen=True, slots=True)
class PreparedVoice:
    """A profile with everything computed once per voice instead of once per sentence."""

    profile: VoiceProfile
    bank: MelBank
    #: Mean and spread of the base voice's cepstra, shaped and equalised.
    base_norm: CepstralNorm
    voiced: VoicingMap
    unvoiced: VoicingMap
    #: How silence moves, [MEL_BANDS]: as speech does on average, so that a pause is no change of microphone.
    silence_move: F32

    @classmethod
    def of(cls, profile: VoiceProfile, features: PhoneFeatures) -> PreparedVoice:
        """Prepare ``profile``; some ten milliseconds."""
        vectors, shapes = _units(profile.unit_log_mel, features)
        base_vectors, base_shapes = _units(profile.base_log_mel, features)
        is_voiced, base_is_voiced = profile.unit_voiced, profile.base_voiced
        voiced = VoicingMap.of(vectors[is_voiced], shapes[is_voiced], _VOICED_SHARE)
        unvoiced = VoicingMap.of(vectors[~is_voiced], shapes[~is_voiced], _UNVOICED_SHARE)
        moves = [
            voiced.moves(base_vectors[base_is_voiced], base_shapes[base_is_voiced]),
            unvoiced.moves(base_vectors[~base_is_voiced], base_shapes[~base_is_voiced]),
        ]
        return cls(
            profile,
            mel_bank(profile.bandwidth_hz),
            _norm(profile.base_log_mel),
            voiced,
            unvoiced,
            np.concatenate(moves).mean(axis=0),
        )

    def shaped(self, parts: Parts) -> Parts:
        """``parts`` of the base voice with this voice's pitch and vocal tract length."""
        return with_pitch(parts, self.profile.f0_scale, self.profile.f0_offset).with_vocal_tract(
            self.profile.vocal_tract_ratio
        )


def shape_of(log_mel: F32) -> F32:
    """``log_mel`` [frames, MEL_BANDS] without each frame's loudness."""
    shape: F32 = log_mel - log_mel.mean(axis=1, keepdims=True)
    return shape


def smoothed(moves: F32) -> F32:
    """``moves`` [frames + 2 * SMOOTHING_REACH, MEL_BANDS] smoothed over time, [frames, MEL_BANDS]."""
    count = len(moves) - 2 * SMOOTHING_REACH
    smooth = np.zeros((count, moves.shape[1]), np.float32)
    for offset, weight in enumerate(_KERNEL):
        smooth += weight * moves[offset : offset + count]
    return smooth


def _norm(log_mel: NDArray[np.float16]) -> CepstralNorm:
    return CepstralNorm.of(cepstra(log_mel.astype(np.float32)))


def _units(log_mel: NDArray[np.float16], features: PhoneFeatures) -> tuple[F32, F32]:
    """Matching vectors and shapes of all speech frames ``log_mel`` of a voice, in the order of speaking."""
    exact = log_mel.astype(np.float32)
    return features(padded(_norm(log_mel)(cepstra(exact)))), shape_of(exact)

"""Where each sound of the base voice has to move to become the speaker's.

Frames are looked up by voicing: nearest (in ``phone_features``) among the speaker's, and nearest among the
base voice's own. The difference of the two mean envelopes is what sets the speaker apart in this sound.
Unlike a move onto the speaker's frames themselves (frame-wise k-nearest-neighbour conversion as of M. Baas
et al., "Voice Conversion With Just Nearest Neighbors", Interspeech 2023) it keeps what is particular to the
frame. Averages still flatten spectra; the contrast lost is measured per band and given back, as global
variance does for statistical conversion (T. Toda et al., 2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.mosaic.phone_features import CepstralNorm, PhoneFeatures, padded
from engines.mosaic.profile import VoiceProfile, with_pitch
from engines.mosaic.source_filter import Parts
from engines.mosaic.spectrum import F32, MEL_BANDS, Bool, MelBank, cepstra, mel_bank

_NEIGHBOURS = 6
#: How much of the difference a frame moves by: all of it costs words, of unvoiced frames sooner.
_VOICED_SHARE = 0.85
_UNVOICED_SHARE = 0.5
_CONTRAST_RANGE = (0.8, 1.4)
#: Bands over which contrast is averaged, to either side.
_CONTRAST_REACH = 3
#: Fewer frames than this say nothing about contrast, or about a voicing at all.
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
class UnitTable:
    """Voiced or unvoiced frames of a voice: matching vectors [units, n], log-mel spectra [units, 60]."""

    vectors: F32
    squared_lengths: F32
    log_mel: F32

    @classmethod
    def of(cls, vectors: F32, log_mel: F32) -> UnitTable:
        """Table of the given rows."""
        return cls(vectors, (vectors**2).sum(axis=1), log_mel)

    def __len__(self) -> int:
        return len(self.vectors)

    def near(self, vectors: F32) -> F32:
        """Mean log-mel spectrum [n, 60] of the units nearest to each of ``vectors`` [n, size]."""
        distances = self.squared_lengths - 2 * vectors @ self.vectors.T
        nearest = np.argpartition(distances, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
        mean: F32 = self.log_mel[nearest].mean(axis=1)
        return mean


@dataclass(frozen=True, slots=True)
class VoicingMap:
    """How frames of one voicing move. ``centre`` and ``contrast`` [60] are of the moved base voice."""

    speaker: UnitTable
    base: UnitTable
    share: float
    centre: F32
    contrast: F32

    @classmethod
    def of(cls, speaker: UnitTable, base: UnitTable, share: float) -> VoicingMap:
        """Measure the contrast that plain moves would cost, to give it back."""
        plain = cls(speaker, base, share, np.zeros(MEL_BANDS, np.float32), np.ones(MEL_BANDS, np.float32))
        if plain.is_empty:
            return plain
        shapes = shape_of(base.log_mel)
        moves = np.pad(
            plain.moves(base.vectors, shapes), ((SMOOTHING_REACH, SMOOTHING_REACH), (0, 0)), "edge"
        )
        moved = shapes + smoothed(moves)
        lost = shape_of(speaker.log_mel).std(axis=0) / moved.std(axis=0)
        around = np.pad(np.clip(lost, *_CONTRAST_RANGE), _CONTRAST_REACH, "edge")
        width = 2 * _CONTRAST_REACH + 1
        contrast = np.convolve(around, np.ones(width) / width, "valid").astype(np.float32)
        return cls(speaker, base, share, moved.mean(axis=0), contrast)

    @property
    def is_empty(self) -> bool:
        """True if the recording has too few frames of this voicing to say anything."""
        return min(len(self.speaker), len(self.base)) < _FEWEST_UNITS

    def moves(self, vectors: F32, shapes: F32) -> F32:
        """Log-mel moves [n, 60] of frames with matching ``vectors`` [n, size] and ``shapes`` [n, 60]."""
        if not len(vectors) or self.is_empty:
            return np.zeros_like(shapes)
        # Loudness over time is the sentence's, not the neighbours': moves have mean zero.
        difference = shape_of(self.speaker.near(vectors) - self.base.near(vectors))
        difference *= np.float32(self.share)
        extra: F32 = self.contrast - np.float32(1)
        restored: F32 = shapes + difference - self.centre
        return difference + extra * restored


@dataclass(frozen=True, slots=True)
class PreparedVoice:
    """A profile with everything computed once per voice instead of once per sentence."""

    profile: VoiceProfile
    bank: MelBank
    #: Mean and spread of the base voice's cepstra, shaped and equalised.
    base_norm: CepstralNorm
    voiced: VoicingMap
    unvoiced: VoicingMap

    @classmethod
    def of(cls, profile: VoiceProfile, features: PhoneFeatures) -> PreparedVoice:
        """Prepare ``profile``; some ten milliseconds."""
        speaker = _units(profile.unit_log_mel, features)
        base = _units(profile.base_log_mel, features)
        voiced, base_voiced = profile.unit_voiced, profile.base_voiced
        return cls(
            profile,
            mel_bank(profile.bandwidth_hz),
            _norm(profile.base_log_mel),
            VoicingMap.of(_rows(speaker, voiced), _rows(base, base_voiced), _VOICED_SHARE),
            VoicingMap.of(_rows(speaker, ~voiced), _rows(base, ~base_voiced), _UNVOICED_SHARE),
        )

    def shaped(self, parts: Parts) -> Parts:
        """``parts`` of the base voice with this voice's pitch and vocal tract length."""
        return with_pitch(parts, self.profile.f0_scale, self.profile.f0_offset).with_vocal_tract(
            self.profile.vocal_tract_ratio
        )


def shape_of(log_mel: F32) -> F32:
    """``log_mel`` [frames, 60] without each frame's loudness."""
    shape: F32 = log_mel - log_mel.mean(axis=1, keepdims=True)
    return shape


def smoothed(moves: F32) -> F32:
    """``moves`` [frames + 2 * SMOOTHING_REACH, 60] smoothed over time, [frames, 60]."""
    count = len(moves) - 2 * SMOOTHING_REACH
    smooth = np.zeros((count, moves.shape[1]), np.float32)
    for offset, weight in enumerate(_KERNEL):
        smooth += weight * moves[offset : offset + count]
    return smooth


def _norm(log_mel: NDArray[np.float16]) -> CepstralNorm:
    return CepstralNorm.of(cepstra(log_mel.astype(np.float32)))


def _units(log_mel: NDArray[np.float16], features: PhoneFeatures) -> UnitTable:
    """All speech frames ``log_mel`` [frames, 60] of a voice, in the order they were spoken."""
    exact = log_mel.astype(np.float32)
    return UnitTable.of(features(padded(_norm(log_mel)(cepstra(exact)))), exact)


def _rows(table: UnitTable, chosen: Bool) -> UnitTable:
    return UnitTable.of(table.vectors[chosen], table.log_mel[chosen])

"""What makes two frames "the same sound", whoever says it.

A frame is described by its cepstra and those of its neighbours, each speaker's own mean and spread taken
out, projected onto the directions that tell phones apart (linear discriminant analysis, trained by
``weights/train_phone_projection.py``), with the plain cepstra beside them at half weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.mosaic.spectrum import CEPSTRA, F32

#: Frames to either side that belong to a frame's description.
CONTEXT_FRAMES = 3
_CONTEXT_WEIGHTS = (0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4)
#: Length of the vector the projection takes.
CONTEXT_SIZE = CEPSTRA * len(_CONTEXT_WEIGHTS)
_PLAIN_WEIGHT = np.float32(0.5)


@dataclass(frozen=True, slots=True)
class CepstralNorm:
    """Mean and spread of a speaker's cepstra, [CEPSTRA] each."""

    mean: F32
    spread: F32

    @classmethod
    def of(cls, speech: F32) -> CepstralNorm:
        """Measured on the cepstra [frames, CEPSTRA] of speech frames."""
        return cls(speech.mean(axis=0), speech.std(axis=0) + np.float32(1e-6))

    def __call__(self, cepstra: F32) -> F32:
        """``cepstra`` [frames, CEPSTRA] with mean 0 and spread 1 over this speaker's speech."""
        return (cepstra - self.mean) / self.spread


def with_context(normalised: F32) -> F32:
    """Each frame with its neighbours, [frames - 6, CONTEXT_SIZE], from [frames, CEPSTRA]."""
    count = len(normalised) - 2 * CONTEXT_FRAMES
    return np.concatenate(
        [
            normalised[offset : offset + count] * np.float32(weight)
            for offset, weight in enumerate(_CONTEXT_WEIGHTS)
        ],
        axis=1,
    )


def padded(frames: F32) -> F32:
    """``frames`` [n, ...] with the first and last repeated, so that ``with_context`` gives n frames."""
    return np.pad(frames, ((CONTEXT_FRAMES, CONTEXT_FRAMES), (0, 0)), mode="edge")


class PhoneFeatures:
    """Normalised cepstra to matching vectors."""

    def __init__(self, projection: F32) -> None:
        """``projection`` [CONTEXT_SIZE, directions]."""
        self._projection = projection

    def __call__(self, normalised: F32) -> F32:
        """Vectors [frames - 6, directions + CEPSTRA] from normalised cepstra [frames, CEPSTRA]."""
        plain = normalised[CONTEXT_FRAMES:-CONTEXT_FRAMES]
        return np.concatenate([with_context(normalised) @ self._projection, _PLAIN_WEIGHT * plain], axis=1)

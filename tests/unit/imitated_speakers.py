"""Speakers for tests of the mosaic engine: its base voice, pitch and vocal tract changed."""

from __future__ import annotations

import numpy as np

from engines.contract import Reference
from engines.mosaic.base_speech import BaseSpeech
from engines.mosaic.profile import with_pitch
from engines.mosaic.renderer import render
from engines.mosaic.spectrum import BINS, SAMPLE_RATE_HZ

ENROLMENT_TEXT = (
    "Wood is best for making toys and blocks. The office paint was a dull, sad tan. "
    "He knew the skill of the great young actress."
)


def imitated_speaker(*, pitch: float, vocal_tract: float) -> Reference:
    """The base voice turned into somebody else; both are ratios."""
    base = BaseSpeech(threads=1).speak_all(ENROLMENT_TEXT)
    parts = with_pitch(base, 1.0, float(np.log(pitch))).with_vocal_tract(vocal_tract)
    samples = render(parts, np.zeros(BINS, np.float32), np.random.default_rng(5))
    return Reference(samples, SAMPLE_RATE_HZ)

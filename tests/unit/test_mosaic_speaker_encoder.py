"""The numpy speaker encoder: its gradient, and what its embedding does not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from engines.mosaic.speaker_encoder import (
    EMBEDDING_SIZE,
    ENCODER_BANDS,
    WINDOW_FRAMES,
    SpeakerEncoder,
    cut_windows,
    without_silence,
)
from engines.mosaic.spectrum import F32
from engines.mosaic.weight_files import SPEAKER_ENCODER


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    return SpeakerEncoder(SPEAKER_ENCODER.tensors())


def speechlike(seconds: float) -> F32:
    """Noise with a slow envelope, 16 kHz."""
    random = np.random.default_rng(3)
    envelope = 1.2 + np.sin(2 * np.pi * 4 * np.arange(int(seconds * 16_000)) / 16_000)
    return (0.05 * envelope * random.standard_normal(len(envelope))).astype(np.float32)


def test_the_gradient_agrees_with_finite_differences(encoder: SpeakerEncoder) -> None:
    mel = encoder.windows(speechlike(3.0), WINDOW_FRAMES // 2)
    random = np.random.default_rng(4)
    target = np.abs(random.standard_normal(EMBEDDING_SIZE)).astype(np.float32)
    target /= np.linalg.norm(target)
    _, gradient = encoder.cosine_and_gradient(mel, target)
    for _ in range(3):
        # A direction with the input's own scale, so that no band drowns the others.
        direction = (mel * random.standard_normal(mel.shape)).astype(np.float32)
        step = np.float32(0.02)
        ahead, _ = encoder.cosine_and_gradient(mel + step * direction, target)
        behind, _ = encoder.cosine_and_gradient(mel - step * direction, target)
        measured = (ahead - behind) / (2 * float(step))
        assert float((gradient * direction).sum()) == pytest.approx(measured, rel=0.05, abs=2e-5)


def test_the_cosine_is_that_of_the_mean_embedding(encoder: SpeakerEncoder) -> None:
    mel = encoder.windows(speechlike(3.0), WINDOW_FRAMES)
    mean = encoder.embed_windows(mel).mean(axis=0)
    target = np.full(EMBEDDING_SIZE, EMBEDDING_SIZE**-0.5, np.float32)
    cosine, gradient = encoder.cosine_and_gradient(mel, target)
    assert cosine == pytest.approx(float(mean @ target / np.linalg.norm(mean)), abs=1e-5)
    assert gradient.shape == mel.shape


def test_the_embedding_does_not_depend_on_loudness(encoder: SpeakerEncoder) -> None:
    samples = speechlike(3.0)
    np.testing.assert_allclose(encoder.embed(samples), encoder.embed(0.1 * samples), atol=1e-3)
    assert np.linalg.norm(encoder.embed(samples)) == pytest.approx(1.0, abs=1e-5)


def test_windows_cover_short_and_long_input() -> None:
    assert cut_windows(np.ones((40, ENCODER_BANDS), np.float32), 80).shape == (1, 160, ENCODER_BANDS)
    assert cut_windows(np.ones((400, ENCODER_BANDS), np.float32), 80).shape == (4, 160, ENCODER_BANDS)


def test_silence_is_cut_but_short_pauses_stay() -> None:
    speech = speechlike(1.0)
    long_pause, short_pause = np.zeros(32_000, np.float32), np.zeros(1600, np.float32)
    assert len(without_silence(np.concatenate([speech, long_pause, speech]))) < 2.5 * 16_000
    assert len(without_silence(np.concatenate([speech, short_pause, speech]))) >= 2.05 * 16_000
    assert len(without_silence(np.zeros(0, np.float32))) == 0

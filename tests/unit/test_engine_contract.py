"""What every registered engine must do, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engines.contract import (
    Abandon,
    Chunk,
    Conditioning,
    ConditioningMismatch,
    Engine,
    NothingToSpeak,
    Reference,
    ReferenceUnusable,
    Samples,
    UnsupportedLanguage,
    UnsupportedOption,
    Utterance,
    UtteranceTooLong,
)
from engines.registry import engine_names, make_engine
from tests.checkpoints.openvoice import write_spoken
from tests.speech import noisy_tone

TEXT = "The birch canoe slid on the smooth planks."
OTHER = "Two blue fish swam in the tank."


def settings(name: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What an engine has to be told to run here; nothing, if it comes with all it needs."""
    if name == "xtts":
        folder = request.getfixturevalue("xtts_checkpoint")
        return {"model_dir": folder, "accept_license": True, "device": "cpu", "window_tokens": (6, 10)}
    if name == "gpt_sovits":
        tiny: dict[str, Any] = request.getfixturevalue("gpt_sovits_settings")
        return tiny
    if name == "openvoice":
        folder = request.getfixturevalue("tmp_path_factory").mktemp("openvoice")
        return {"model_dir": write_spoken(folder), "cache_dir": folder / "cache"}
    return {}


@pytest.fixture(scope="module", params=engine_names())
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each registered engine, loaded."""
    engine = make_engine(request.param, settings(request.param, request))
    assert engine.concurrent_batches >= 1
    engine.load()
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def anna(engine: Engine) -> Conditioning:
    """A high voice."""
    return engine.extract_voice(Reference(noisy_tone(210.0, 4.0), 24_000, transcript="Anna.", language="en"))


@pytest.fixture(scope="module")
def ben(engine: Engine) -> Conditioning:
    """A low voice."""
    return engine.extract_voice(Reference(noisy_tone(110.0, 4.0), 24_000, transcript="Ben.", language="en"))


def speak(engine: Engine, *batch: Utterance) -> list[Samples]:
    """Each row's samples; checks what the contract says about chunks on the way."""
    rows: list[list[Samples]] = [[] for _ in batch]
    ended: set[int] = set()
    for chunk in engine.synthesize(list(batch)):
        assert chunk.error is None, chunk.error
        assert chunk.row not in ended, "a chunk came after the last one of its row"
        assert chunk.samples.dtype == np.float32
        assert chunk.samples.ndim == 1
        rows[chunk.row].append(chunk.samples)
        if chunk.last:
            ended.add(chunk.row)
    assert ended == set(range(len(batch)))
    return [np.concatenate(row) for row in rows]


def failure(engine: Engine, utterance: Utterance) -> Chunk:
    """The one chunk of a batch that cannot be spoken."""
    (chunk,) = engine.synthesize([utterance])
    assert chunk.last
    assert len(chunk.samples) == 0
    return chunk


def test_card_states_its_facts(engine: Engine) -> None:
    card = engine.card
    assert card.name in engine_names()
    assert card.languages
    assert set(card.languages) <= set(engine.languages)
    assert 8_000 <= card.sample_rate_hz <= 48_000
    assert card.max_chars("anything") > 0
    assert card.summary.endswith(".")
    assert card.code_licence
    assert card.weights_licence
    assert engine.weights_fingerprint


def test_speech_is_audible_finite_and_unclipped(engine: Engine, anna: Conditioning) -> None:
    (samples,) = speak(engine, Utterance(TEXT, "en", anna, seed=1))
    assert 0.5 < len(samples) / engine.card.sample_rate_hz < 10
    assert np.isfinite(samples).all()
    assert 0.01 < np.sqrt(np.mean(samples**2)) < 0.5
    assert np.abs(samples).max() <= 1


def test_same_seed_same_samples_alone_and_in_any_batch(
    engine: Engine, anna: Conditioning, ben: Conditioning
) -> None:
    first, second = Utterance(TEXT, "en", anna, seed=5), Utterance(OTHER, "en", ben, seed=6, speed=1.25)
    (alone,) = speak(engine, first)
    (again,) = speak(engine, first)
    np.testing.assert_array_equal(alone, again)
    if engine.config.slots > 1:
        together = speak(engine, second, first)
        np.testing.assert_array_equal(alone, together[1])
        np.testing.assert_array_equal(speak(engine, second)[0], together[0])


def test_seed_matters(engine: Engine, anna: Conditioning) -> None:
    (one,) = speak(engine, Utterance(TEXT, "en", anna, seed=1))
    (two,) = speak(engine, Utterance(TEXT, "en", anna, seed=2))
    assert one.shape != two.shape or not np.array_equal(one, two)


def test_voice_matters(engine: Engine, anna: Conditioning, ben: Conditioning) -> None:
    (high,) = speak(engine, Utterance(TEXT, "en", anna, seed=1))
    (low,) = speak(engine, Utterance(TEXT, "en", ben, seed=1))
    assert high.shape != low.shape or not np.allclose(high, low, atol=1e-3)


def test_speed_changes_length(engine: Engine, anna: Conditioning) -> None:
    lengths = [
        len(speak(engine, Utterance(TEXT, "en", anna, seed=1, speed=speed))[0]) for speed in (0.7, 1.0, 1.5)
    ]
    assert lengths[0] > 1.15 * lengths[1] > 1.15 * 1.15 * lengths[2]


def test_streaming_engines_stream(engine: Engine, anna: Conditioning) -> None:
    chunks = list(engine.synthesize([Utterance(TEXT, "en", anna, seed=1)]))
    assert (len(chunks) > 2) == engine.card.streams


def test_conditioning_survives_storage(engine: Engine, anna: Conditioning) -> None:
    stored = Conditioning.from_bytes(anna.to_bytes())
    assert (stored.engine, stored.weights_fingerprint) == (engine.card.name, engine.weights_fingerprint)
    (before,) = speak(engine, Utterance(TEXT, "en", anna, seed=1))
    (after,) = speak(engine, Utterance(TEXT, "en", stored, seed=1))
    np.testing.assert_array_equal(before, after)


def test_extraction_is_deterministic(engine: Engine, anna: Conditioning) -> None:
    again = engine.extract_voice(Reference(noisy_tone(210.0, 4.0), 24_000, transcript="Anna.", language="en"))
    assert again.to_bytes() == anna.to_bytes()


def test_foreign_conditioning_is_refused(engine: Engine, anna: Conditioning) -> None:
    foreign = Conditioning(engine.card.name, "other-weights", anna.arrays)
    chunk = failure(engine, Utterance(TEXT, "en", foreign, seed=1))
    assert isinstance(chunk.error, ConditioningMismatch)


def test_unknown_language_is_refused(engine: Engine, anna: Conditioning) -> None:
    chunk = failure(engine, Utterance(TEXT, "tlh", anna, seed=1))
    assert isinstance(chunk.error, UnsupportedLanguage)
    assert "en" in chunk.error.next_step


def test_too_long_is_refused_and_the_limit_is_not(engine: Engine, anna: Conditioning) -> None:
    limit = engine.card.max_chars("en")
    text = ("the cat sat on the mat and " * (limit // 27 + 1))[: limit - 1] + "."
    (samples,) = speak(engine, Utterance(text, "en", anna, seed=1))
    assert len(samples) > engine.card.sample_rate_hz
    chunk = failure(engine, Utterance(text + "x", "en", anna, seed=1))
    assert isinstance(chunk.error, UtteranceTooLong)


def test_nothing_to_speak_is_refused(engine: Engine, anna: Conditioning) -> None:
    chunk = failure(engine, Utterance("…!?", "en", anna, seed=1))
    assert isinstance(chunk.error, NothingToSpeak)


def test_unknown_option_is_refused(engine: Engine, anna: Conditioning) -> None:
    chunk = failure(engine, Utterance(TEXT, "en", anna, seed=1, options={"no_such_option": 1}))
    assert isinstance(chunk.error, UnsupportedOption)


def test_one_bad_row_fails_alone(engine: Engine, anna: Conditioning) -> None:
    if engine.config.slots == 1:
        return
    good = Utterance(TEXT, "en", anna, seed=1)
    chunks = list(engine.synthesize([Utterance("…", "en", anna, seed=1), good]))
    assert [chunk.row for chunk in chunks if chunk.error] == [0]
    (alone,) = speak(engine, good)
    np.testing.assert_array_equal(alone, np.concatenate([c.samples for c in chunks if c.row == 1]))


def test_abandoned_row_stops_and_the_other_goes_on(engine: Engine, anna: Conditioning) -> None:
    gone = Utterance(TEXT, "en", anna, seed=1, abandoned=Abandon())
    stream = engine.synthesize([gone])
    next(stream)
    gone.abandoned.set()
    assert len(list(stream)) <= 1
    if engine.config.slots > 1:
        gone = Utterance(TEXT, "en", anna, seed=1, abandoned=Abandon())
        gone.abandoned.set()
        good = Utterance(OTHER, "en", anna, seed=2)
        chunks = list(engine.synthesize([gone, good]))
        assert {chunk.row for chunk in chunks} == {1}
        np.testing.assert_array_equal(speak(engine, good)[0], np.concatenate([c.samples for c in chunks]))


def test_closing_stops_and_leaves_the_engine_usable(engine: Engine, anna: Conditioning) -> None:
    utterance = Utterance(TEXT, "en", anna, seed=1)
    (before,) = speak(engine, utterance)
    stream = engine.synthesize([utterance])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    (after,) = speak(engine, utterance)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "samples",
    [np.zeros(48_000, np.float32), np.zeros(0, np.float32), noisy_tone(200.0, 0.1)],
    ids=["silence", "empty", "short"],
)
def test_unusable_reference_is_refused_with_the_reason(engine: Engine, samples: Samples) -> None:
    with pytest.raises(ReferenceUnusable) as caught:
        engine.extract_voice(Reference(samples, 24_000))
    assert caught.value.next_step


def test_refining_keeps_the_identity(engine: Engine, anna: Conditioning) -> None:
    reference = Reference(noisy_tone(210.0, 4.0), 24_000, transcript="Anna.", language="en")
    better = engine.refine_voice(reference, anna)
    if better is not None:
        engine.check_conditioning(better)
        speak(engine, Utterance(TEXT, "en", better, seed=1))

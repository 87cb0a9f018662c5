"""Other languages than English: the mosaic engine with and without its espeak extra."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.judges import second_encoder_embedding
from engines.calibration_texts import CALIBRATION_TEXTS
from engines.contract import (
    Abandon,
    Conditioning,
    EngineError,
    ModelCorrupt,
    ModelError,
    ModelMissing,
    NothingToSpeak,
    Reference,
    Samples,
    SynthesisFailed,
    UnsupportedLanguage,
    Utterance,
)
from engines.mosaic.engine import MosaicConfig, MosaicEngine
from engines.mosaic.espeak_speech import EXTRA, LANGUAGES, EspeakSpeech, Manner
from engines.pitch import track_f0
from tests.unit.imitated_speakers import imitated_speaker

RATE_HZ = 24_000
#: Not the texts a voice is calibrated with.
TEXTS = {
    "es": "El tren de las ocho llega siempre con retraso a la estación, y mi hermana ya no quiere esperar.",
    "fr": "Le train de huit heures arrive toujours en retard à la gare, et ma sœur ne veut plus attendre.",
    "de": "Der Zug um acht Uhr kommt immer zu spät am Bahnhof an, und meine Schwester will nicht warten.",
}


@pytest.fixture(scope="module")
def engine() -> MosaicEngine:
    loaded = MosaicEngine(MosaicConfig())
    loaded.load()
    return loaded


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> MosaicEngine:
    """An engine loaded where the package of the extra cannot be found."""
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    loaded = MosaicEngine(MosaicConfig())
    loaded.load()
    return loaded


@pytest.fixture(scope="module")
def speakers() -> list[Reference]:
    """A large and a small speaker."""
    return [imitated_speaker(pitch=0.6, vocal_tract=0.86), imitated_speaker(pitch=1.25, vocal_tract=1.08)]


@pytest.fixture(scope="module")
def voices(engine: MosaicEngine, speakers: list[Reference]) -> list[Conditioning]:
    return [engine.extract_voice(speaker) for speaker in speakers]


def speak(engine: MosaicEngine, *utterances: Utterance) -> list[Samples]:
    rows: list[list[Samples]] = [[] for _ in utterances]
    for chunk in engine.synthesize(utterances):
        assert chunk.error is None, chunk.error
        rows[chunk.row].append(chunk.samples)
    return [np.concatenate(row) for row in rows]


def only_error(engine: MosaicEngine, utterance: Utterance) -> EngineError:
    (chunk,) = engine.synthesize([utterance])
    assert chunk.last
    assert chunk.error is not None
    return chunk.error


def median_f0_hz(samples: Samples) -> float:
    f0_hz = track_f0(samples, RATE_HZ)
    return float(np.median(f0_hz[f0_hz > 0]))


# --- with the extra -------------------------------------------------------------------------------------


def test_english_comes_first_and_the_extra_adds_the_rest(engine: MosaicEngine) -> None:
    assert engine.languages == ("en", *LANGUAGES)
    assert engine.card.languages == ("en",)
    assert engine.card.optional_languages == {EXTRA: LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_spoken_in_the_pitch_of_the_speaker(
    engine: MosaicEngine, speakers: list[Reference], voices: list[Conditioning], language: str
) -> None:
    text = CALIBRATION_TEXTS[language].partition(". ")[0] + " 3,14."
    for speaker, voice in zip(speakers, voices, strict=True):
        (samples,) = speak(engine, Utterance(text, language, voice, seed=1))
        assert samples.dtype == np.float32
        assert 3 < len(samples) / RATE_HZ < 20
        assert np.abs(samples).max() < 1
        assert 0.02 < np.sqrt(np.mean(samples**2)) < 0.2
        assert median_f0_hz(samples) == pytest.approx(median_f0_hz(speaker.samples), rel=0.15)


@pytest.mark.parametrize("language", TEXTS)
def test_conversion_brings_speech_nearer_to_the_speaker(
    engine: MosaicEngine, speakers: list[Reference], voices: list[Conditioning], language: str
) -> None:
    espeak = EspeakSpeech.installed()
    assert espeak is not None
    rises = []
    for speaker, voice in zip(speakers, voices, strict=True):
        own = second_encoder_embedding(speaker.samples, RATE_HZ)
        manner = Manner.near(median_f0_hz(speaker.samples))
        unconverted = espeak.speak(TEXTS[language], language, manner)
        (converted,) = speak(engine, Utterance(TEXTS[language], language, voice, seed=1))
        before, after = (
            float(second_encoder_embedding(samples, RATE_HZ) @ own) for samples in (unconverted, converted)
        )
        rises.append(after - before)
    assert min(rises) > 0.03
    assert np.mean(rises) > 0.1


def test_a_row_is_bit_identical_alone_in_any_batch_and_in_another_engine(
    engine: MosaicEngine, voices: list[Conditioning]
) -> None:
    rows = [
        Utterance(TEXTS["es"], "es", voices[0], seed=1),
        Utterance("Yes, of course.", "en", voices[1], seed=2),
        Utterance(TEXTS["de"], "de", voices[1], seed=3, speed=1.3),
    ]
    together = speak(engine, *rows)
    other = MosaicEngine(MosaicConfig())
    other.load()
    for row, samples in zip(reversed(rows), reversed(together), strict=True):
        np.testing.assert_array_equal(speak(other, row)[0], samples)


def test_two_threads_speak_at_once(voices: list[Conditioning]) -> None:
    engines = [MosaicEngine(MosaicConfig()) for _ in range(2)]
    for engine in engines:
        engine.load()
    rows = [Utterance(TEXTS[language], language, voices[0], seed=1) for language in ("es", "fr")]
    with ThreadPoolExecutor(2) as threads:
        pairs = list(zip(engines, rows, strict=True)) * 3
        together = list(threads.map(lambda pair: speak(pair[0], pair[1])[0], pairs))
    for (engine, row), samples in zip(pairs, together, strict=True):
        np.testing.assert_array_equal(speak(engine, row)[0], samples)


def test_speeds(engine: MosaicEngine, voices: list[Conditioning]) -> None:
    lengths = [
        len(speak(engine, Utterance(TEXTS["es"], "es", voices[0], seed=1, speed=speed))[0])
        for speed in (0.25, 0.5, 1.0, 2.0, 4.0)
    ]
    for slow, fast in pairwise(lengths):
        assert 1.5 < slow / fast < 2.5


def test_speech_is_streamed_and_stops_when_abandoned(
    engine: MosaicEngine, voices: list[Conditioning]
) -> None:
    row = Utterance(TEXTS["fr"], "fr", voices[0], seed=1, abandoned=Abandon())
    assert len(list(engine.synthesize([row]))) > 5
    stream = engine.synthesize([row])
    next(stream)
    row.abandoned.set()
    assert list(stream) == []


def test_markup_and_commands_are_text(engine: MosaicEngine, voices: list[Conditioning]) -> None:
    def said(text: str) -> Samples:
        return speak(engine, Utterance(text, "es", voices[0], seed=1))[0]

    assert len(said("hola <break time='9s'/> mundo")) < 8 * RATE_HZ
    assert len(said("<b>hola</b>")) > len(said("hola"))
    # As phonemes these were three sounds; as text the apostrophe parts two words.
    assert len(said("[[m'as]]")) > 1.2 * len(said("mas"))
    # This control character starts a command to espeak-ng: here to speak at 30 words per minute.
    np.testing.assert_array_equal(said("\x0130S hola mundo"), said(" 30S hola mundo"))
    np.testing.assert_array_equal(said("hola\0 mundo"), said("hola  mundo"))
    np.testing.assert_array_equal(said("hola \ud800mundo"), said("hola  mundo"))


def test_the_longest_text_is_spoken(engine: MosaicEngine, voices: list[Conditioning]) -> None:
    limit = engine.card.max_chars("es")
    (samples,) = speak(engine, Utterance(((TEXTS["es"] + " ") * 5)[:limit], "es", voices[0], seed=1))
    assert 15 < len(samples) / RATE_HZ < 45


@pytest.mark.parametrize("text", ["", "  ", "…!!", "😀", "((("])
def test_text_without_words_is_nothing_to_speak(
    engine: MosaicEngine, voices: list[Conditioning], text: str
) -> None:
    assert isinstance(only_error(engine, Utterance(text, "es", voices[0], seed=1)), NothingToSpeak)


def test_a_crashing_program_fails_its_row_alone(
    engine: MosaicEngine, voices: list[Conditioning], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(-11, "espeak-ng", stderr=b"")

    monkeypatch.setattr(subprocess, "run", crash)
    good = Utterance("Good morning.", "en", voices[0], seed=1)
    chunks = list(engine.synthesize([replace(good, language="es"), good]))
    assert [type(chunk.error) for chunk in chunks if chunk.error] == [SynthesisFailed]
    assert chunks[-1].row == 1


# --- without it -----------------------------------------------------------------------------------------


def test_without_the_extra_it_is_english_only_and_says_what_to_install(
    without_extra: MosaicEngine, voices: list[Conditioning]
) -> None:
    assert without_extra.languages == ("en",)
    for language in ("es", "ja"):
        error = only_error(without_extra, Utterance("Hola.", language, voices[0], seed=1))
        assert isinstance(error, UnsupportedLanguage)
        assert "It speaks: en." in error.next_step
        assert f"pip install '{EXTRA}'" in error.next_step


def test_the_extra_is_never_installed_by_default() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["espeak"] == ["espeakng-loader==0.2.4"]
    assert not [requirement for requirement in project["dependencies"] if "espeak" in requirement]


def test_with_the_extra_a_refused_language_is_not_sent_to_pip(
    engine: MosaicEngine, voices: list[Conditioning]
) -> None:
    error = only_error(engine, Utterance("こんにちは", "ja", voices[0], seed=1))
    assert isinstance(error, UnsupportedLanguage)
    assert "pip" not in error.next_step
    assert "es" in error.next_step


def test_a_voice_enrolled_without_the_extra_speaks_with_it(
    engine: MosaicEngine, without_extra: MosaicEngine, speakers: list[Reference], voices: list[Conditioning]
) -> None:
    voice = without_extra.extract_voice(speakers[0])
    assert voice.to_bytes() == voices[0].to_bytes()
    speak(engine, Utterance(TEXTS["es"], "es", voice, seed=1))


@pytest.mark.parametrize(
    ("library", "expected"), [(None, ModelMissing), (b"not a library", ModelCorrupt)], ids=["gone", "damaged"]
)
def test_an_extra_that_cannot_speak_stops_loading(
    library: bytes | None, expected: type[ModelError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library is not None:
        (tmp_path / "libespeak-ng.so").write_bytes(library)
        (tmp_path / "espeak-ng-data").mkdir()
    spec = ModuleSpec("espeakng_loader", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(expected, match="espeak-ng") as failure:
        MosaicEngine(MosaicConfig()).load()
    assert EXTRA in failure.value.next_step

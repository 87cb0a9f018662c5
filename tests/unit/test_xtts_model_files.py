"""What XTTS-v2 refuses to load, and what it says; what a slot costs; where speech ends."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.contract import LicenceNotAccepted, ModelCorrupt, ModelError, ModelMissing, Samples
from engines.coqui import prepare_coqui
from engines.weights import MODELS_DIR_VARIABLE, weights_dir
from engines.xtts.engine import XttsEngine
from engines.xtts.settings import XttsConfig

prepare_coqui("xtts")
import torch  # noqa: E402 - after prepare_coqui, as everything below

from engines.xtts.ending import Ending  # noqa: E402
from engines.xtts.memory import require_room, slot_bytes  # noqa: E402

CPU = torch.device("cpu")
FILES = ("config.json", "model.pth", "vocab.json", "speakers_xtts.pth")


def load(folder: Path, **settings: Any) -> None:
    """Load the checkpoint in ``folder``, and unload it should that work."""
    engine = XttsEngine(XttsConfig(model_dir=folder, device="cpu", **{"accept_license": True, **settings}))
    engine.load()
    engine.unload()


@pytest.fixture
def copy(xtts_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose files may be replaced."""
    for name in FILES:
        (tmp_path / name).symlink_to(xtts_checkpoint / name)
    return tmp_path


def replace(file: Path, content: bytes) -> None:
    """Other ``content`` in place of a linked file."""
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "model.pth", "vocab.json"])
def test_missing_file_is_named_with_the_command_that_gets_it(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ModelMissing) as caught:
        load(copy)
    assert name in caught.value.message
    assert str(copy) in caught.value.message
    assert "voice-clone models pull xtts" in caught.value.next_step


def test_licence_has_to_be_accepted(copy: Path) -> None:
    with pytest.raises(LicenceNotAccepted) as caught:
        load(copy, accept_license=False)
    assert "accept_license" in caught.value.next_step
    (copy / "LICENCE_ACCEPTED").touch()
    (copy / "model.pth").unlink()
    with pytest.raises(ModelMissing):
        load(copy, accept_license=False)


class _Attack:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    replace(copy / name, whole[: len(whole) // 2])
    with pytest.raises(ModelCorrupt) as caught:
        load(copy)
    assert str(copy / name) in caught.value.message


@pytest.mark.parametrize("name", ["model.pth", "speakers_xtts.pth"])
def test_pickle_runs_no_code(copy: Path, name: str) -> None:
    trace = copy / "trace"
    replace(copy / name, pickle.dumps({"model": _Attack(trace)}))
    with pytest.raises(ModelCorrupt):
        load(copy)
    assert not trace.exists()


def test_weights_of_another_model_are_refused(copy: Path) -> None:
    (copy / "model.pth").unlink()
    torch.save({"model": {"gpt.mel_head.bias": torch.zeros(3)}}, copy / "model.pth")
    with pytest.raises(ModelCorrupt, match="does not fit config"):
        load(copy)


def test_weights_that_are_not_numbers_are_refused(copy: Path) -> None:
    checkpoint = torch.load(copy / "model.pth", weights_only=True)
    checkpoint["model"]["gpt.final_norm.bias"][3] = float("nan")
    (copy / "model.pth").unlink()
    torch.save(checkpoint, copy / "model.pth")
    with pytest.raises(ModelCorrupt, match=r"final_norm\.bias"):
        load(copy)


def test_arithmetic_the_device_lacks_is_refused(copy: Path) -> None:
    with pytest.raises(ModelError, match="no precision 'fp16' on cpu"):
        load(copy, precision="fp16")


def test_device_that_is_not_there_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = XttsEngine(XttsConfig(model_dir=copy, accept_license=True, device="cuda:0"))
    with pytest.raises(ModelError, match="no CUDA device"):
        engine.load()


#: The published model's dimensions, as coqui-tts's GPT has them.
PUBLISHED = SimpleNamespace(
    layers=30, model_dim=1024, heads=16, max_text_tokens=404, max_gen_mel_tokens=602, max_prompt_tokens=70
)


def test_slots_are_counted_before_they_are_used() -> None:
    # The table of docs/xtts.md.
    assert round(slot_bytes(PUBLISHED, "fp32") / 1e6) == 258
    assert round(slot_bytes(PUBLISHED, "bf16") / 1e6) == 129
    require_room(4, 1 << 20, 4, CPU)
    with pytest.raises(ModelError) as caught:
        require_room(5, 1 << 20, 4, CPU)
    assert "5 slots" in caught.value.message
    assert "4 or fewer" in caught.value.next_step
    with pytest.raises(ModelError, match="are free"):
        require_room(1000, 1 << 40, None, CPU)


def test_too_many_slots_are_refused_at_load(copy: Path) -> None:
    with pytest.raises(ModelError, match="cache_mb"):
        load(copy, slots=1024, cache_mb=100)


def test_weights_lie_in_the_models_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(MODELS_DIR_VARIABLE, str(tmp_path))
    assert weights_dir("xtts") == tmp_path / "xtts"
    engine = XttsEngine(XttsConfig(accept_license=True, device="cpu"))
    with pytest.raises(ModelMissing, match=str(tmp_path / "xtts")):
        engine.load()


def tone(seconds: float, level: float = 0.5) -> Samples:
    """A tone at 1 kHz sampling; ``level`` is its peak."""
    return np.asarray(level * np.sin(np.arange(round(seconds * 1000)) * 1.3), np.float32)


def test_what_follows_the_last_sound_is_cut() -> None:
    ending = Ending(1000)
    heard = [ending.push(piece) for piece in (tone(0.5), tone(0.4, 1e-4), tone(0.5), tone(0.7, 1e-4))]
    rest = ending.finish()
    assert not ending.passed
    # The pause inside is kept, the silence at the end is not.
    assert abs(sum(map(len, heard)) - 1400) < 5
    np.testing.assert_array_equal(np.concatenate(heard)[:900], np.concatenate([tone(0.5), tone(0.4, 1e-4)]))
    assert len(rest) == 100
    assert rest[-1] == 0


def test_silence_longer_than_a_pause_is_the_end() -> None:
    ending = Ending(1000)
    ending.push(tone(0.5))
    ending.push(tone(1.5, 1e-5))
    assert not ending.passed
    ending.push(tone(0.6, 1e-5))
    assert ending.passed

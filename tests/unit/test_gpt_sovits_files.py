"""The files of GPT-SoVITS: converted without running code, and named when they are missing or damaged."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.contract import ModelCorrupt, ModelError, ModelMissing
from engines.gpt_sovits.convert import _read, convert, main
from engines.gpt_sovits.engine import GptSovitsEngine
from engines.gpt_sovits.settings import GptSovitsConfig
from tests.checkpoints.gpt_sovits import GPT, SOVITS, write_checkpoint

V2 = SOVITS["v2"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As training leaves it: the configuration is an object of upstream's own class."""
    return write_checkpoint(tmp_path_factory.mktemp("published"), pickled_config=True)


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """To be spoilt."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


def load(folder: Path, **changed: Any) -> None:
    settings = {"model_dir": folder, "gpt": GPT, "sovits": V2, "device": "cpu", "languages": ("ja",)}
    engine = GptSovitsEngine(GptSovitsConfig(**{**settings, **changed}))
    engine.load()
    engine.unload()


def test_what_is_published_is_converted_and_loads(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(copy), "--gpt", GPT, "--sovits", V2])
    assert "s1v3.safetensors" in capsys.readouterr().out
    # Nothing pickled is needed any more, nor written.
    for file in [*copy.rglob("*.ckpt"), *copy.rglob("*.pth"), *copy.rglob("*.bin")]:
        file.unlink()
    before = sorted(copy.rglob("*"))
    load(copy)
    assert sorted(copy.rglob("*")) == before


def test_what_is_not_converted_is_not_loaded(published: Path) -> None:
    with pytest.raises(ModelMissing, match=r"s1v3\.safetensors") as caught:
        load(published)
    assert "engines.gpt_sovits.convert" in caught.value.next_step


class _Attack:
    """Leaves ``mark`` behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("name", [f"{GPT}.ckpt", f"{V2}.pth", "chinese-hubert-base/pytorch_model.bin"])
def test_code_in_a_checkpoint_is_not_run(copy: Path, name: str, tmp_path: Path) -> None:
    torch.save({"weight": {}, "config": _Attack(tmp_path / "mark")}, copy / name)
    with pytest.raises(ModelCorrupt, match=Path(name).stem):
        convert(copy, GPT, V2)
    assert not (tmp_path / "mark").exists()


def test_code_in_the_names_is_not_run(copy: Path) -> None:
    names = copy / "g2p/en/namedict_cache.pickle"
    names.write_bytes(pickle.dumps({"anna": [["AE1", "N", "AH0"]]}))
    convert(copy, GPT, V2)
    assert "anna" in (copy / "g2p/en/namedict.json").read_text()
    names.write_bytes(pickle.dumps(_Attack(copy / "mark")))
    with pytest.raises(ModelCorrupt, match="namedict"):
        convert(copy, GPT, V2)
    assert not (copy / "mark").exists()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("s1v3.safetensors", "voice-clone models pull gpt_sovits"),
        (f"{V2}.safetensors", "voice-clone models pull gpt_sovits"),
        ("chinese-hubert-base/config.json", "voice-clone models pull gpt_sovits"),
        ("g2p/en/cmudict.rep", "docs/gpt_sovits.md"),
        ("g2p/zh/opencpop-strict.txt", "docs/gpt_sovits.md"),
    ],
)
def test_a_missing_file_is_named_with_its_licence_and_what_to_do(
    gpt_sovits_settings: dict[str, Any], tmp_path: Path, missing: str, said: str
) -> None:
    folder = tmp_path / "model"
    ignored = shutil.ignore_patterns("*.ckpt", "*.pth", "*.bin")
    shutil.copytree(gpt_sovits_settings["model_dir"], folder, ignore=ignored)
    (folder / missing).unlink()
    with pytest.raises(ModelMissing) as caught:
        load(folder, languages=("en", "zh"))
    assert str(folder / missing) in str(caught.value)
    assert "MIT" in str(caught.value)
    assert said in caught.value.next_step


@pytest.mark.parametrize("damaged", ["s1v3.safetensors", f"{V2}.safetensors", "g2p/en/cmudict.rep"])
def test_a_damaged_file_is_named(gpt_sovits_settings: dict[str, Any], tmp_path: Path, damaged: str) -> None:
    folder = tmp_path / "model"
    ignored = shutil.ignore_patterns("*.ckpt", "*.pth", "*.bin")
    shutil.copytree(gpt_sovits_settings["model_dir"], folder, ignore=ignored)
    (folder / damaged).write_bytes(b"\n" * 56 + b"nonsense")
    with pytest.raises(ModelCorrupt) as caught:
        load(folder, languages=("en",))
    assert Path(damaged).parts[0] in str(caught.value)


def test_another_version_is_refused(copy: Path) -> None:
    file = copy / f"{V2}.pth"
    content = {**_read(file), "config": {}}
    content["weight"]["cfm.estimator.weight"] = torch.zeros(1)
    torch.save(content, file)
    with pytest.raises(ModelCorrupt, match="v3"):
        convert(copy, GPT, V2)


@pytest.mark.parametrize("changed", [{"device": "cuda:7"}, {"precision": "fp16"}])
def test_what_this_machine_cannot_do_is_said(
    gpt_sovits_settings: dict[str, Any], changed: dict[str, Any]
) -> None:
    with pytest.raises(ModelError) as caught:
        load(gpt_sovits_settings["model_dir"], **changed)
    assert caught.value.next_step


def test_the_package_is_kept_quiet() -> None:
    """Its import sets up logging for everybody, silences warnings and takes the name ``utils``."""
    script = """
import logging, sys, warnings
from engines.gpt_sovits.package import prepare_package
from engines.torchaudio_on_cpu import import_torchaudio
import_torchaudio()
filters = list(warnings.filters)
prepare_package()
assert logging.getLogger().handlers == [], logging.getLogger().handlers
assert logging.getLogger().level == logging.WARNING
assert warnings.filters == filters
assert "utils" not in sys.modules
"""
    environment = {**os.environ, "PYTHONWARNINGS": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""

"""Where weights are looked for, and what is said when they are not there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines import weights
from engines.contract import LicenceNotAccepted, ModelError, ModelMissing
from engines.tone.engine import ToneEngine
from engines.weights import LICENCE_ACCEPTED, require_files, require_licence, weights_dir

ROOT = Path(__file__).parents[2]


def test_the_variable_wins_over_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOICE_CLONE_MODELS_DIR", raising=False)
    assert weights_dir("xtts") == ROOT / "models" / "xtts"
    monkeypatch.setenv("VOICE_CLONE_MODELS_DIR", str(tmp_path))
    assert weights_dir("xtts") == tmp_path / "xtts"
    monkeypatch.setenv("VOICE_CLONE_MODELS_DIR", "~/weights")
    assert weights_dir("xtts") == Path.home() / "weights" / "xtts"


def test_a_relative_folder_is_refused_with_an_absolute_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOICE_CLONE_MODELS_DIR", "weights")
    with pytest.raises(ModelError, match="VOICE_CLONE_MODELS_DIR") as caught:
        weights_dir("xtts")
    assert str(Path.cwd() / "weights") in caught.value.next_step


def test_an_installed_package_uses_the_home_folder(tmp_path: Path) -> None:
    shutil.copytree(Path(weights.__file__).parent, tmp_path / "site" / "engines")
    script = "from engines import weights; print(weights.__file__); print(weights.weights_dir('xtts'))"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "site",
        env={"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    module, folder = answer.stdout.split()
    assert module.startswith(str(tmp_path))
    assert folder == str(tmp_path / ".local/share/voice-clone/models/xtts")


def test_missing_files_are_named_with_folder_licence_and_command(tmp_path: Path) -> None:
    (tmp_path / "there.pth").touch()
    require_files(ToneEngine.card, tmp_path, ["there.pth"])
    with pytest.raises(ModelMissing) as caught:
        require_files(ToneEngine.card, tmp_path, ["there.pth", "gone.pth"])
    assert "no gone.pth." in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert ToneEngine.card.weights_licence in caught.value.message
    assert "voice-clone models pull tone" in caught.value.next_step


def test_an_unaccepted_licence_stops_the_load(tmp_path: Path) -> None:
    with pytest.raises(LicenceNotAccepted, match="accepted"):
        require_licence(ToneEngine.card, tmp_path, accepted=False)
    require_licence(ToneEngine.card, tmp_path, accepted=True)
    (tmp_path / LICENCE_ACCEPTED).write_text("none, 2026-01-01\n")
    require_licence(ToneEngine.card, tmp_path, accepted=False)

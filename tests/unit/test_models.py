"""Weights arrive whole and checked or not at all, whatever the line, the hub and the power supply do."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from engines.contract import LicenceNotAccepted
from engines.weights import LICENCE_ACCEPTED
from serve_app import cli
from serve_app.models import PullFailed, Weights, check, files_here, load_catalogue, pull
from tests.model_hub import ModelHub, serving

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
#: More than twice what huggingface_hub reads at a time.
MODEL_BYTES = 24_000_000
CONTENTS = {
    "config.json": b'{"model": "small"}',
    "part/model.pth": random.Random(1).randbytes(MODEL_BYTES),  # noqa: S311 - just bytes
}
PART = f"part/model.pth.{REVISION[:12]}.part"
PULL = """
import sys
from pathlib import Path
from serve_app.models import load_catalogue, pull
pull("small", load_catalogue(Path(sys.argv[1]))["small"], Path(sys.argv[2]))
"""


def entry(*, must_be_accepted: bool = False, known: bool = True) -> dict[str, Any]:
    """A catalogue's entry for ``CONTENTS``."""
    files: list[dict[str, Any]] = [{"path": path} for path in CONTENTS]
    if known:
        for file in files:
            content = CONTENTS[file["path"]]
            file |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "repository": "someone/small",
        "revision": REVISION,
        "licence": {
            "name": "Strict Licence 2.0",
            "link": "https://example.org/strict",
            "terms": "no use at all",
            "must_be_accepted": must_be_accepted,
        },
        "files": files,
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub with ``CONTENTS`` that ``HF_ENDPOINT`` points to."""
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "VOICE_CLONE_MODELS_DIR"):
        monkeypatch.delenv(variable, raising=False)
    with serving(ModelHub("someone/small", REVISION, CONTENTS)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def weights() -> Weights:
    """What the catalogue says about ``CONTENTS``."""
    return Weights.model_validate(entry())


def states(weights: Weights, folder: Path) -> dict[str, str]:
    """What ``verify`` says, by path."""
    return {file.path: state for file, state in check(weights, folder)}


def test_a_pull_brings_every_file_and_a_second_one_asks_for_none(
    hub: ModelHub, weights: Weights, tmp_path: Path
) -> None:
    pull("small", weights, tmp_path / "small")
    assert states(weights, tmp_path / "small") == dict.fromkeys(CONTENTS, "ok")
    assert sorted(
        str(path.relative_to(tmp_path / "small")) for path in tmp_path.rglob("*") if path.is_file()
    ) == sorted(CONTENTS)
    asked = len(hub.requests)
    said: list[str] = []
    pull("small", weights, tmp_path / "small", say=said.append)
    assert len(hub.requests) == asked
    assert said == [f"{path}: ok" for path in CONTENTS]


@pytest.mark.parametrize("stop_by", ["close", "reset"])
def test_a_cut_connection_is_taken_up_where_it_broke(
    stop_by: str, hub: ModelHub, weights: Weights, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(CONTENTS["config.json"])
    hub.stop_after_bytes = 15_000_000
    hub.stop_by = "close" if stop_by == "close" else "reset"
    pull("small", weights, tmp_path)
    assert states(weights, tmp_path)["part/model.pth"] == "ok"
    whole, rest = hub.ranges_asked("model.pth")
    assert whole == ""
    assert 1_000_000 < int(rest.removeprefix("bytes=").removesuffix("-")) <= 15_000_000


def test_a_killed_pull_leaves_no_file_and_the_next_one_goes_on(
    hub: ModelHub, weights: Weights, tmp_path: Path
) -> None:
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(yaml.safe_dump({"small": entry()}))
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONTENTS["config.json"])
    hub.stop_after_bytes, hub.stop_by = 15_000_000, "silence"
    pulling = subprocess.Popen([sys.executable, "-c", PULL, catalogue, folder], stderr=subprocess.PIPE)
    deadline_s = time.monotonic() + 60
    while not (folder / PART).is_file() or (folder / PART).stat().st_size < 1_000_000:
        assert time.monotonic() < deadline_s
        assert pulling.poll() is None, pulling.communicate()
        time.sleep(0.02)
    # Beside the one that runs, another would write into the same file.
    with pytest.raises(PullFailed, match="another process"):
        pull("small", weights, folder)
    pulling.send_signal(signal.SIGKILL)
    pulling.communicate()

    arrived_bytes = (folder / PART).stat().st_size
    assert states(weights, folder) == {"config.json": "ok", "part/model.pth": "missing"}
    pull("small", weights, folder)
    assert states(weights, folder)["part/model.pth"] == "ok"
    assert hub.ranges_asked("model.pth") == ["", f"bytes={arrived_bytes}-"]
    assert not (folder / PART).exists()


def test_a_file_with_the_wrong_content_is_thrown_away(
    hub: ModelHub, weights: Weights, tmp_path: Path
) -> None:
    hub.files = CONTENTS | {"part/model.pth": bytes(MODEL_BYTES)}
    with pytest.raises(PullFailed, match=r"part/model\.pth came from .* with the wrong hash"):
        pull("small", weights, tmp_path)
    assert states(weights, tmp_path) == {"config.json": "ok", "part/model.pth": "missing"}
    assert not (tmp_path / PART).exists()
    hub.files = CONTENTS
    pull("small", weights, tmp_path)
    assert states(weights, tmp_path) == dict.fromkeys(CONTENTS, "ok")


def test_a_file_of_another_size_is_not_even_begun(hub: ModelHub, weights: Weights, tmp_path: Path) -> None:
    hub.files = CONTENTS | {"part/model.pth": bytes(MODEL_BYTES + 1)}
    with pytest.raises(PullFailed, match=r"has 24000001 bytes at .*, where 24000000 are"):
        pull("small", weights, tmp_path)
    assert hub.ranges_asked("model.pth") == []


def test_a_damaged_file_is_named_and_replaced(hub: ModelHub, weights: Weights, tmp_path: Path) -> None:
    pull("small", weights, tmp_path)
    model = tmp_path / "part/model.pth"
    model.write_bytes(bytes(MODEL_BYTES))
    (tmp_path / "config.json").write_bytes(b"{}")
    assert states(weights, tmp_path) == {"config.json": "wrong size", "part/model.pth": "wrong hash"}
    assert files_here(weights, tmp_path) == 1  # the quick look sees sizes only
    pull("small", weights, tmp_path)
    assert model.read_bytes() == CONTENTS["part/model.pth"]


def test_what_nobody_recorded_is_said_to_be_not_known(hub: ModelHub, tmp_path: Path) -> None:
    weights = Weights.model_validate(entry(known=False))
    pull("small", weights, tmp_path)
    assert states(weights, tmp_path) == dict.fromkeys(CONTENTS, "not known")
    assert (tmp_path / "part/model.pth").read_bytes() == CONTENTS["part/model.pth"]


def test_a_strict_licence_is_accepted_by_the_operator_alone(hub: ModelHub, tmp_path: Path) -> None:
    weights = Weights.model_validate(entry(must_be_accepted=True))
    with pytest.raises(LicenceNotAccepted) as caught:
        pull("small", weights, tmp_path)
    for said in ("Strict Licence 2.0", "no use at all", "https://example.org/strict", "--accept-license"):
        assert said in str(caught.value)
    assert hub.requests == []
    assert list(tmp_path.iterdir()) == []

    pull("small", weights, tmp_path, accept_licence=True)
    name, link, accepted = (tmp_path / LICENCE_ACCEPTED).read_text().splitlines()
    assert (name, link) == ("Strict Licence 2.0", "https://example.org/strict")
    assert accepted.startswith("accepted 20")
    pull("small", weights, tmp_path)  # said once is enough

    another = weights.licence.model_copy(update={"name": "Strict Licence 3.0"})
    with pytest.raises(LicenceNotAccepted):
        pull("small", weights.model_copy(update={"licence": another}), tmp_path)


@pytest.mark.parametrize(
    ("refuse", "says"),
    [
        ((401, "GatedRepo"), "Ask for access on that page, then set HF_TOKEN"),
        ((403, "GatedRepo"), "Ask for access on that page, then set HF_TOKEN"),
        ((401, "RepoNotFound"), r"not shown to you \(status 401\).*Check HF_TOKEN"),
        ((401, ""), r"not shown to you \(status 401\).*Check HF_TOKEN"),
        ((404, "RepoNotFound"), r"not shown to you \(status 404\)"),
        ((404, "RevisionNotFound"), f"has no config.json at revision {REVISION}"),
        ((404, "EntryNotFound"), f"has no config.json at revision {REVISION}"),
        ((503, ""), "answered with status 503. Run the command again"),
    ],
)
def test_a_refusal_is_one_sentence_with_the_repository(
    refuse: tuple[int, str], says: str, hub: ModelHub, weights: Weights, tmp_path: Path
) -> None:
    hub.refuse = refuse
    with pytest.raises(PullFailed, match=says) as caught:
        pull("small", weights, tmp_path)
    assert hub.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_token_goes_to_the_hub_and_not_to_whoever_keeps_the_content(
    hub: ModelHub, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(dataclasses.replace(hub, requests=[]), host="127.0.0.2") as content:
        hub.content_url = content.url
        pull("small", weights, tmp_path)
        assert {authorization for *_, authorization in content.requests} == {""}
    assert {authorization for *_, authorization in hub.requests} == {"Bearer hf_secret"}
    assert states(weights, tmp_path) == dict.fromkeys(CONTENTS, "ok")


def test_no_connection_and_no_permission_to_connect(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullFailed, match=r"The connection to http://127\.0\.0\.1:9 failed \(.+\)"):
        pull("small", weights, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it is imported
    with pytest.raises(PullFailed, match="HF_HUB_OFFLINE forbids"):
        pull("small", weights, tmp_path)


def test_a_disk_without_room_is_seen_before_the_download(
    hub: ModelHub, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, used, _ = shutil.disk_usage(tmp_path)
    little = type(shutil.disk_usage(tmp_path))(total, used, 22_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(PullFailed, match=r"24 MB are to be fetched, and .* has 22 MB left"):
        pull("small", weights, tmp_path / "new" / "small")
    assert not (tmp_path / "new").exists()
    # What has arrived needs no room any more.
    (tmp_path / PART).parent.mkdir()
    (tmp_path / PART).write_bytes(CONTENTS["part/model.pth"][:2_000_000])
    pull("small", weights, tmp_path)


def test_a_disk_that_fills_up_on_the_way(hub: ModelHub, weights: Weights, tmp_path: Path) -> None:
    (tmp_path / PART).parent.mkdir()
    (tmp_path / PART).symlink_to("/dev/full")
    with pytest.raises(PullFailed, match=r"The disk is full\. Make room. Run the command again"):
        pull("small", weights, tmp_path)
    assert states(weights, tmp_path)["part/model.pth"] == "missing"


def test_without_the_client_of_the_hub_the_extra_is_named(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PullFailed, match=r"pip install 'voice-clone-tts\[models\]'"):
        pull("small", weights, tmp_path)


def test_the_wheel_carries_the_catalogue(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = "from serve_app.models import CATALOGUE, load_catalogue as load; print(CATALOGUE, *load())"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "site",
        check=True,
        capture_output=True,
        text=True,
    )
    path, *engines = answer.stdout.split()
    assert path == str(tmp_path / "site/serve_app/catalogue.yaml")
    assert engines == list(load_catalogue())


def test_the_catalogue_is_sound() -> None:
    catalogue = load_catalogue()
    assert {"xtts", "openvoice", "gpt_sovits"} <= set(catalogue)
    assert catalogue["xtts"].licence.must_be_accepted
    for weights in catalogue.values():
        assert all(file.sha256 and file.size_bytes for file in weights.files)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mirror": "x"}, "mirror"),
        ({"revision": "main"}, "revision"),
        ({"files": []}, "files"),
        ({"files": [{"path": "../outside"}]}, "path"),
        ({"files": [{"path": "/etc/passwd"}]}, "path"),
        ({"files": [{"path": "a", "sha256": "abc"}]}, "sha256"),
    ],
)
def test_a_mistaken_catalogue_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"small": entry() | change}))
    with pytest.raises(ValidationError, match=named):
        load_catalogue(path)


def test_the_commands(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOICE_CLONE_MODELS_DIR", str(tmp_path))
    small = {"small": Weights.model_validate(entry(must_be_accepted=True))}
    monkeypatch.setattr(cli, "load_catalogue", lambda: small)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["models", *arguments])
        if isinstance(result.exception, (PullFailed, LicenceNotAccepted)):
            return 1, str(result.exception)
        return result.exit_code, result.output

    assert run("path", "small") == (0, f"{tmp_path}/small\n")
    assert "0 of 2" in run("list")[1]
    assert run("verify", "small") == (1, "config.json: missing\npart/model.pth: missing\n")
    status, text = run("pull", "small")
    assert (status, "Strict Licence 2.0" in text) == (1, True)
    assert run("pull", "small", "--accept-license")[0] == 0
    assert run("verify", "small") == (0, "config.json: ok\npart/model.pth: ok\n")
    assert "2 of 2" in run("list")[1]
    (tmp_path / "small/config.json").write_bytes(bytes(len(CONTENTS["config.json"])))
    assert run("verify", "small") == (1, "config.json: wrong hash\npart/model.pth: ok\n")
    status, text = run("pull", "huge")
    assert status == 2
    assert "small" in text

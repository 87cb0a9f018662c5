"""Every snippet of README and docs runs as printed; only the address and the voice's name are another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile

from tests.graph.conftest import Server
from tests.speech import noisy_tone, wav_bytes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return [body for kind, body in _FENCE.findall(page.read_text()) if kind == language]


def adapt(snippet: str, server: Server) -> str:
    """Point a snippet at the server under test, and at a voice no other test uses."""
    return snippet.replace("http://localhost:8000", server.url).replace("anna", "reader")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as a reader would have it: with a recording, and nothing else."""
    (tmp_path / "reader.wav").write_bytes(wav_bytes(noisy_tone(140.0)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_readme_speaks_in_curl_and_in_python(server: Server, desk: Path) -> None:
    (shell,) = snippets(ROOT / "README.md", "bash")
    # -f: a refused request must fail the snippet, not write its error to the file.
    subprocess.run(
        ["bash", "-euc", adapt(shell, server).replace("curl -s", "curl -sf")],
        check=True,
        cwd=desk,
        env=os.environ,
    )
    for snippet in snippets(ROOT / "README.md", "python"):
        exec(compile(adapt(snippet, server), "README.md", "exec"), {})  # noqa: S102
    for name in ("hello.mp3", "hello.wav", "hello.flac"):
        samples, rate_hz = soundfile.read(desk / name)
        assert len(samples) > rate_hz / 2
    server.http.delete("/v1/audio/voices/reader").raise_for_status()


def test_tutorial_engine_runs_and_obeys_the_contract(desk: Path) -> None:
    definition, use = snippets(ROOT / "docs" / "new_engine.md", "python")
    (desk / "hum.py").write_text(definition)
    namespace: dict[str, Any] = {}
    exec(compile(use, "new_engine.md", "exec"), namespace)  # noqa: S102
    assert len(namespace["chunks"]) == 3
    assert namespace["chunks"][-1].last


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_error_code_is_documented() -> None:
    from serve_app.errors import VoiceCloneError, all_kinds

    text = (ROOT / "docs" / "api.md").read_text()
    # Only what is derived from this one is ever raised.
    codes = {kind.code for kind in all_kinds(VoiceCloneError)} - {"not_found"}
    assert not {code for code in codes if f"`{code}`" not in text}


def test_every_target_of_the_makefile_that_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)`", (ROOT / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

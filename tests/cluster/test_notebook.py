"""The quickstart notebook runs from its first cell to its last in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.cluster.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_script_and_notebook_are_the_same() -> None:
    script = jupytext.read(NOTEBOOK.with_suffix(".py"))
    notebook = jupytext.read(NOTEBOOK)
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (script, notebook)]
    assert cells[0] == cells[1], "run: jupytext --sync notebooks/quickstart.py"
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"


def test_every_cell_runs(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_TMPDIR", "VOICE_CLONE__VOICES__STORE"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    players = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "<audio" in output.get("data", {}).get("text/html", "")
    ]
    assert players, "no cell showed a player"
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000

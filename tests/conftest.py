"""Runs before any test module is imported, and so before Ray is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.environment import prepare_environment

prepare_environment()


@pytest.fixture(scope="session")
def xtts_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny XTTS-v2 with random weights, whose utterances last a little over a second."""
    # Here, because it imports torch, which most tests do without.
    from tests.checkpoints.xtts import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("xtts"), stop_after=26)


@pytest.fixture(scope="session")
def gpt_sovits_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a tiny GPT-SoVITS v2 with random weights, whose utterances last a little over a second."""
    from tests.checkpoints.gpt_sovits import write_converted

    folder = tmp_path_factory.mktemp("gpt_sovits")
    return {**write_converted(folder), "window_tokens": (8, 10)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what needs a GPU where there is none; it is counted among the deselected."""
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needs_gpu or _has_cuda():
        return
    config.hook.pytest_deselected(items=needs_gpu)
    items[:] = [item for item in items if item not in needs_gpu]


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())

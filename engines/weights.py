"""Where the weights of engines lie that do not come with a package."""

from __future__ import annotations

import os
from pathlib import Path

MODELS_DIR_VARIABLE = "VOICE_CLONE_MODELS_DIR"
_DEFAULT_MODELS_DIR = "~/.local/share/voice-clone/models"


def weights_dir(engine: str) -> Path:
    """Folder of the weights of ``engine``, in ``$VOICE_CLONE_MODELS_DIR`` or the default models folder."""
    return Path(os.environ.get(MODELS_DIR_VARIABLE) or _DEFAULT_MODELS_DIR).expanduser() / engine

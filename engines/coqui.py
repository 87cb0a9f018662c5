"""coqui-tts (package ``TTS``) made importable: for the engines that are built on it."""

from __future__ import annotations

import importlib
import logging

from engines.contract import ModelMissing
from engines.torchaudio_on_cpu import import_torchaudio


def prepare_coqui(extra: str) -> None:
    """Make ``import TTS`` work in this process, and quiet. May be called again.

    ``extra`` is the extra of this package that brings what is missing. Raises ``ModelMissing`` naming it.
    """
    try:
        import_torchaudio()
        importlib.import_module("TTS")
    except ImportError as error:
        raise ModelMissing(
            f"A package this engine is built on is not installed: {error.name or error}.",
            next_step=f"pip install 'voice-clone-tts[{extra}]' where the engine runs.",
        ) from error
    # Both announce every model they build at INFO.
    for name in ("TTS", "trainer"):
        logging.getLogger(name).setLevel(logging.WARNING)

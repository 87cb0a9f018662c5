"""gsv-tts-lite (package ``gsv_tts``) made importable, and kept from doing more than it is asked to.

Its model classes and its text front end are used. Importing it sets up logging for the whole process,
silences all warnings and registers a module called ``utils``; that is undone here. What downloads models
(its class ``TTS``) is never made.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from engines.contract import ModelMissing
from engines.torchaudio_on_cpu import import_torchaudio

EXTRA = "gpt-sovits"
#: These announce what they build at INFO, or every few milliseconds at DEBUG.
_TALKATIVE = ("jieba", "numba", "nltk", "transformers")


def prepare_package() -> None:
    """Make ``import gsv_tts`` work in this process. May be called again. Raises ``ModelMissing``."""
    try:
        import_torchaudio()
        with undisturbed():
            importlib.import_module("gsv_tts")
    except ImportError as error:
        raise ModelMissing(
            f"A package this engine is built on is not installed: {error.name or error}.",
            next_step=f"pip install 'voice-clone-tts[{EXTRA}]' where the engine runs.",
        ) from error
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, the package's code may be imported; logging, warnings and ``utils`` are then as before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    # With a handler there, logging is not set up again, at INFO.
    root.addHandler(logging.NullHandler())
    utils = sys.modules.get("utils")
    try:
        # Its sources have escape sequences that Python warns about when it first reads them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        if utils is not None:
            sys.modules["utils"] = utils
        elif getattr(sys.modules.get("utils"), "__name__", "").startswith("gsv_tts."):
            del sys.modules["utils"]

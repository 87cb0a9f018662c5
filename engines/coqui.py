"""coqui-tts (package ``TTS``) made importable: for the engines that are built on it.

torchaudio's wheel on PyPI is linked against CUDA, so beside a torch for the CPU it fails to import. All that
coqui-tts uses of it (resampling, spectrograms) is written in Python; torchaudio has a state of its own for
"built without the native part", and that is the state it is put into here. With a CUDA torch nothing changes.
Never call ``torchaudio.load``: it needs torchcodec, which needs the same libraries.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

from engines.contract import ModelMissing


def prepare_coqui(extra: str) -> None:
    """Make ``import TTS`` work in this process, and quiet. May be called again.

    ``extra`` is the extra of this package that brings what is missing. Raises ``ModelMissing`` naming it.
    """
    try:
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            _import_without_native_part()
        importlib.import_module("TTS")
    except ImportError as error:
        raise ModelMissing(
            f"A package this engine is built on is not installed: {error.name or error}.",
            next_step=f"pip install 'voice-clone-tts[{extra}]' where the engine runs.",
        ) from error
    # Both announce every model they build at INFO.
    for name in ("TTS", "trainer"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _import_without_native_part() -> None:
    if "torchaudio" in sys.modules:
        return
    extension = ModuleType("torchaudio._extension")
    extension.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        # Marks functions of the native part; nothing here calls one.
        fail_if_no_align=lambda function: function,
    )
    sys.modules[extension.__name__] = extension
    importlib.import_module("torchaudio")

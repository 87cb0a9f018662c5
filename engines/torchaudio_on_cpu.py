"""torchaudio made importable beside a torch for the CPU.

Its wheel on PyPI is linked against CUDA, so beside such a torch it fails to import. All that is used of it
here and by the packages the engines are built on (resampling, spectrograms, filter banks) is written in
Python; torchaudio has a state of its own for "built without the native part", and that is the state it is
put into. With a CUDA torch nothing changes. Never call ``torchaudio.load``: it needs torchcodec, which
needs the same libraries.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def import_torchaudio() -> None:
    """Import torch and torchaudio. May be called again. Raises ``ImportError`` if one is not installed."""
    import torch

    if "torchaudio" in sys.modules:
        return
    if torch.version.cuda is None and torch.version.hip is None:
        extension = ModuleType("torchaudio._extension")
        extension.__dict__.update(
            _IS_TORCHAUDIO_EXT_AVAILABLE=False,
            _IS_ALIGN_AVAILABLE=False,
            # Marks functions of the native part; nothing here calls one.
            fail_if_no_align=lambda function: function,
        )
        sys.modules[extension.__name__] = extension
    importlib.import_module("torchaudio")

"""A model file that comes inside an installed package, checked against its SHA-256 before it is used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
from numpy.typing import NDArray

from engines.contract import ModelCorrupt, ModelMissing


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file and what it has to be. ``origin`` says in words where to get it again."""

    path: Path
    sha256: str
    origin: str

    def verified(self) -> bytes:
        """The file's content. Raises ``ModelMissing`` or ``ModelCorrupt``."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError as error:
            raise ModelMissing(
                f"The model file {self.path} is not there.", next_step=f"Install {self.origin} again."
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise ModelCorrupt(
                f"The model file {self.path} has SHA-256 {found}, expected {self.sha256}.",
                next_step=f"Install {self.origin} again.",
            )
        return content

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors of a safetensors file. Raises as ``verified`` does."""
        return safetensors.numpy.load(self.verified())

"""The model files the engine stands on, each checked against its SHA-256 before it is used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hibari.tts
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


_WEIGHTS = Path(__file__).parent / "weights"

BASE_MODEL = WeightFile(
    Path(hibari.tts.ASSETS) / "hibari.onnx",
    "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8",
    "the package hibari-tts==0.2.1",
)
SPEAKER_ENCODER = WeightFile(
    _WEIGHTS / "speaker_encoder.safetensors",
    "95cd96d575d7691143e761724a7cce75ca7d0d4427b15c205a95743ed1cb95fb",
    "the package voice-clone-tts",
)
PHONE_PROJECTION = WeightFile(
    _WEIGHTS / "phone_projection.safetensors",
    "09c7a665c97df70db8d15739d6978472d7dbb96ba6bd763456f302170d2316c7",
    "the package voice-clone-tts",
)

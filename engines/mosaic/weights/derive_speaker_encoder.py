"""Write ``speaker_encoder.safetensors`` from the checkpoint inside the Resemblyzer wheel.

Development only; the engine never imports it. It needs torch to read the checkpoint::

    pip download --no-deps Resemblyzer==0.1.4 && unzip Resemblyzer-0.1.4-py3-none-any.whl -d resemblyzer
    python engines/mosaic/weights/derive_speaker_encoder.py resemblyzer/resemblyzer/pretrained.pt

What changes: the optimizer state is dropped, the two biases of each LSTM layer are added up, matrices are
turned so that inputs come first, and everything is stored as float16.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
from numpy.typing import NDArray
from safetensors.numpy import save_file

_SOURCE_SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
_TARGET = Path(__file__).parent / "speaker_encoder.safetensors"


def derive(checkpoint: Path) -> dict[str, NDArray[np.float16]]:
    """The engine's tensors from ``checkpoint``. SystemExit if it is not the file this was written for."""
    found = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    if found != _SOURCE_SHA256:
        raise SystemExit(f"{checkpoint} has sha256 {found}, expected {_SOURCE_SHA256}")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model_state"]
    tensors = {"linear.weight": state["linear.weight"], "linear.bias": state["linear.bias"]}
    for layer in range(3):
        tensors[f"lstm{layer}.from_input"] = state[f"lstm.weight_ih_l{layer}"].T
        tensors[f"lstm{layer}.from_hidden"] = state[f"lstm.weight_hh_l{layer}"].T
        tensors[f"lstm{layer}.bias"] = state[f"lstm.bias_ih_l{layer}"] + state[f"lstm.bias_hh_l{layer}"]
    return {name: tensor.contiguous().numpy().astype(np.float16) for name, tensor in tensors.items()}


def main() -> None:
    """Derive from the path on the command line and say what was written."""
    save_file(derive(Path(sys.argv[1])), _TARGET)
    digest = hashlib.sha256(_TARGET.read_bytes()).hexdigest()
    sys.stdout.write(f"{_TARGET}: {_TARGET.stat().st_size} bytes, sha256 {digest}\n")


if __name__ == "__main__":
    main()

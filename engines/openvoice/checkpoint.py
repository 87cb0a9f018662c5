"""The files of OpenVoice v2, as its authors publish them, and the model they hold.

::

    checkpoints_v2/converter/config.json          sizes of the model and its audio format
    checkpoints_v2/converter/checkpoint.pth       {"model": weights}, float32, 131 MB
    checkpoints_v2/base_speakers/ses/NAME.pth     tone colours of the MeloTTS voices, [1, 256, 1]

The last are not read: they belong to voices that are not spoken with here, and the colour of every other base
voice is measured on its own speech.

The model is coqui-tts's port (``TTS.vc.models.openvoice``). Its own loader reads only the ``data`` part of
``config.json``; here the sizes in the ``model`` part count too.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.contract import EngineCard, ModelCorrupt
from engines.weights import require_files

if TYPE_CHECKING:
    import torch
    from TTS.vc.models.openvoice import OpenVoice

#: Changes whenever the same weights and recording would give another conditioning or other speech.
_ALGORITHM_VERSION = "1"
CONFIG, WEIGHTS = "converter/config.json", "converter/checkpoint.pth"
FETCH = "Fetch them again: voice-clone models pull openvoice."
_SAMPLE_RATE_HZ = 22_050


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with the files above, or with ``checkpoints_v2``. Nothing is read before ``load``."""

    card: EngineCard
    directory: Path

    def load(self) -> tuple[OpenVoice, str]:
        """The model on the CPU in float32, ready for inference, and the fingerprint of its weights.

        ``prepare_coqui`` was called before. Raises ``ModelMissing`` or ``ModelCorrupt``.
        """
        from TTS.vc.models.openvoice import OpenVoice

        unpacked = self.directory / "checkpoints_v2"
        folder = unpacked if unpacked.is_dir() else self.directory
        require_files(self.card, folder, (CONFIG, WEIGHTS))
        config_path, weights_path = folder / CONFIG, folder / WEIGHTS
        config = _model_config(config_path)
        try:
            model = OpenVoice(config)
            model.load_state_dict(_tensors(weights_path)["model"], strict=True)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ModelCorrupt(
                f"The weights in {weights_path} are not those of the model that {config_path} describes: "
                f"{_first_lines(error)}",
                next_step=FETCH,
            ) from error
        model.eval().requires_grad_(False)
        _fold_weight_norm(model)
        return model, _fingerprint(config_path, weights_path)


def _model_config(path: Path) -> Any:
    """Configuration of the model that ``path`` describes. Raises ``ModelCorrupt``."""
    from TTS.vc.configs.openvoice_config import OpenVoiceArgs, OpenVoiceAudioConfig, OpenVoiceConfig

    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        data, sizes = described["data"], described["model"]
        known = set(OpenVoiceArgs().keys())
        arguments = OpenVoiceArgs(**{name: value for name, value in sizes.items() if name in known})
        audio = OpenVoiceAudioConfig(
            input_sample_rate=data["sampling_rate"],
            output_sample_rate=data["sampling_rate"],
            fft_size=data["filter_length"],
            hop_length=data["hop_length"],
            win_length=data["win_length"],
        )
        upsampled = math.prod(arguments.upsample_rates)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelCorrupt(
            f"{path} does not describe an OpenVoice converter: {error!r}.", next_step=FETCH
        ) from error
    if audio.output_sample_rate != _SAMPLE_RATE_HZ or upsampled != audio.hop_length:
        raise ModelCorrupt(
            f"{path} describes a converter for {audio.output_sample_rate} Hz that makes {upsampled} samples "
            f"of each {audio.hop_length}; OpenVoice v2 works at {_SAMPLE_RATE_HZ} Hz.",
            next_step=FETCH,
        )
    return OpenVoiceConfig(model_args=arguments, audio=audio)


def _tensors(path: Path) -> Any:
    """What ``path`` holds, tensors only: one that brings code is refused. Raises ``ModelCorrupt``."""
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ModelCorrupt(f"{path} cannot be read: {_first_lines(error)}", next_step=FETCH) from error


def _fold_weight_norm(model: torch.nn.Module) -> None:
    """Compute each weight once and for all instead of from its norm and direction in every call.

    The output stays the same bit for bit; a sixth of the time goes.
    """
    from torch.nn.utils import parametrize

    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    model.requires_grad_(False)


def _fingerprint(*paths: Path) -> str:
    """Short hash of the content of ``paths`` and of the algorithm's version."""
    digest = hashlib.sha256(_ALGORITHM_VERSION.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _first_lines(error: Exception) -> str:
    """The start of a message of torch, which may go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400]

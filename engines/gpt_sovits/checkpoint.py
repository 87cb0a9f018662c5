"""The converted files (see ``convert``), read into modules. Nothing here unpickles anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from engines.contract import EngineCard, ModelCorrupt, ModelMissing
from engines.gpt_sovits.convert import DESCRIPTION, HUBERT, SPEAKER_ENCODER, VERSIONS
from engines.gpt_sovits.package import undisturbed
from engines.gpt_sovits.settings import GptSovitsConfig
from engines.gpt_sovits.text import BERT_FILES, FILES
from engines.weights import pull_command

#: What the converted files come from, by ending.
_PUBLISHED = (".ckpt", ".pth", ".bin")
#: Of the training only.
_UNUSED = ("enc_q.",)


@dataclass(frozen=True, slots=True)
class GptWeights:
    """Tensors of the GPT by their published names less ``model.``, float32, and its configuration."""

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that is loaded: float32, on the CPU, in evaluation mode, weight norm folded."""

    gpt: GptWeights
    #: gsv-tts-lite's ``SynthesizerTrn``, and the part ``data`` of its configuration.
    sovits: Any
    audio: Mapping[str, Any]
    #: transformers' ``HubertModel``.
    hubert: Any
    #: gsv-tts-lite's ``ERes2NetV2``; None for v2, which does not use it.
    speaker_encoder: Any | None


def load_checkpoint(card: EngineCard, folder: Path, settings: GptSovitsConfig) -> Checkpoint:
    """Read what ``settings`` name in ``folder``. ``prepare_package`` was called.

    Raises ``ModelMissing`` or ``ModelCorrupt``, naming the file.
    """
    gpt_file, sovits_file = (folder / f"{name}.safetensors" for name in (settings.gpt, settings.sovits))
    hubert = folder / HUBERT
    texts = [name for language in settings.languages for name in FILES[language]]
    _require_converted(card, (gpt_file, sovits_file, hubert / "model.safetensors"))
    _require(card, folder, (f"{HUBERT}/config.json", *texts, *(BERT_FILES if settings.bert else ())))
    sovits, audio = _sovits(sovits_file)
    speaker_encoder = None
    if sovits.is_v2pro:
        encoder_file = folder / f"{SPEAKER_ENCODER}.safetensors"
        _require_converted(card, (encoder_file,))
        speaker_encoder = _speaker_encoder(encoder_file)
    return Checkpoint(_gpt(gpt_file), sovits, audio, _hubert(hubert), speaker_encoder)


def _require_converted(card: EngineCard, files: tuple[Path, ...]) -> None:
    for file in files:
        if file.is_file():
            continue
        stem = str(file).removesuffix(".safetensors")
        published = [f"{stem}{ending}" for ending in _PUBLISHED]
        if file.name == "model.safetensors":
            published.append(str(file.with_name("pytorch_model.bin")))
        if any(Path(name).is_file() for name in published):
            raise ModelMissing(
                f"{file} is not there: the published file beside it has not been converted.",
                next_step="Run 'python -m engines.gpt_sovits.convert FOLDER' once, with the model folder.",
            )
        raise _missing(card, file)


def _require(card: EngineCard, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise _missing(card, folder / name)


def _missing(card: EngineCard, file: Path) -> ModelMissing:
    if "g2p" in file.parts:
        # Not in the repository of the weights.
        step = "docs/gpt_sovits.md says where the text data comes from; nothing is downloaded by itself."
    else:
        step = f"Run '{pull_command(card)}' and then 'python -m engines.gpt_sovits.convert FOLDER', or set "
        step += "model_dir to the folder that has it."
    return ModelMissing(
        f"A file of '{card.name}' (licence: {card.weights_licence}) is not there: {file}.", next_step=step
    )


def _corrupt(file: Path, reason: str) -> ModelCorrupt:
    return ModelCorrupt(
        f"{file} is not a usable file of GPT-SoVITS: {reason}.",
        next_step="Get the published file again and run 'python -m engines.gpt_sovits.convert FOLDER'.",
    )


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float32, and what the file says about itself."""
    try:
        with safetensors.safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
        description: dict[str, Any] = json.loads(metadata.get(DESCRIPTION, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise _corrupt(file, str(error).splitlines()[0][:200]) from error
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise _corrupt(file, f"'{name}' holds values that are not numbers")
    return state, description


def _gpt(file: Path) -> GptWeights:
    state, description = _read(file)
    config = description.get("config", {}).get("model")
    if not isinstance(config, dict):
        raise _corrupt(file, "it does not describe a GPT")
    named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    width, vocabulary = config.get("hidden_dim"), config.get("vocab_size")
    head = named.get("ar_predict_layer.weight")
    if head is None or tuple(head.shape) != (vocabulary, width):
        raise _corrupt(file, "its weights are not of the size it describes")
    return GptWeights(named, config)


def _sovits(file: Path) -> tuple[Any, Mapping[str, Any]]:
    from gsv_tts.GPT_SoVITS.SoVITS.models import SynthesizerTrn

    state, description = _read(file)
    config = description.get("config", {})
    if description.get("version") not in VERSIONS or not {"data", "model", "train"} <= set(config):
        raise _corrupt(file, "it does not describe SoVITS v2, v2Pro or v2ProPlus")
    audio = config["data"]
    if audio.get("sampling_rate") != 32_000:
        raise _corrupt(file, f"it speaks at {audio.get('sampling_rate')} Hz, not at 32000")
    try:
        # Its weight norm is of a kind torch warns about.
        with undisturbed():
            network = SynthesizerTrn(
                audio["filter_length"] // 2 + 1,
                config["train"]["segment_size"] // audio["hop_length"],
                n_speakers=audio["n_speakers"],
                **{**config["model"], "version": description["version"]},
            )
        wanted = {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED)}
        network.load_state_dict(wanted, strict=True)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _corrupt(file, " ".join(lines[:2])[:300]) from error
    network.eval().requires_grad_(False)
    # Computed once instead of in every call; of the flow too, which the package leaves as it is.
    network.dec.remove_weight_norm()
    for module in network.flow.modules():
        if any(name == "weight_g" for name, _ in module.named_parameters(recurse=False)):
            remove_weight_norm(module)
    return network, audio


def _hubert(folder: Path) -> Any:
    from transformers import HubertModel

    try:
        model: Any = HubertModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _corrupt(folder / "model.safetensors", str(error).splitlines()[0][:200]) from error
    return model.eval().requires_grad_(False)


def _speaker_encoder(file: Path) -> nn.Module:
    from gsv_tts.GPT_SoVITS.SV.ERes2NetV2 import ERes2NetV2

    state, _ = _read(file)
    network: nn.Module = ERes2NetV2(baseWidth=24, scale=4, expansion=4)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise _corrupt(file, "it is no ERes2NetV2 of the published size") from error
    return network.eval().requires_grad_(False)

"""The published files of XTTS-v2, read into coqui-tts's modules.

A checkpoint is ``config.json``, ``model.pth``, ``vocab.json`` and, if it has speakers of its own,
``speakers_xtts.pth``. Pickles are read with ``weights_only``: a crafted file can fail, but not run code. The
files are only read; coqui-tts's own loader writes old ones anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from TTS.tts.configs.xtts_config import XttsConfig
from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
from TTS.tts.models.xtts import Xtts, _legacy_safe_globals

from engines.contract import EngineCard, ModelCorrupt
from engines.weights import require_files

CONFIG, MODEL, VOCABULARY, SPEAKERS = "config.json", "model.pth", "vocab.json", "speakers_xtts.pth"

#: Parts of a state that say what a recording becomes. Everything else only says how it is spoken.
_CONDITIONING_PARTS = ("gpt.conditioning_", "hifigan_decoder.speaker_encoder.", "mel_stats")
#: Left over from training, or second names of tensors that are there already.
_UNUSED_PARTS = (
    "torch_mel_spectrogram_style_encoder.",
    "torch_mel_spectrogram_dvae.",
    "dvae.",
    "gpt.gpt_inference.",
    "gpt.gpt.wte.",
)


@dataclass(frozen=True, slots=True)
class XttsModel:
    """A loaded checkpoint: float32, on the CPU, in evaluation mode, weight norm folded."""

    network: Any
    tokenizer: VoiceBpeTokenizer
    config: XttsConfig
    #: Hash of what conditioning depends on.
    fingerprint: str
    #: Speakers that come with the model: latents [32, width] and embedding [512], by name.
    speakers: Mapping[str, tuple[Tensor, Tensor]]


def load_model(card: EngineCard, folder: Path) -> XttsModel:
    """Read the checkpoint in ``folder``. Raises ``ModelMissing`` or ``ModelCorrupt``, naming the file."""
    require_files(card, folder, (CONFIG, VOCABULARY, MODEL))
    config = _read_config(folder / CONFIG)
    tokenizer = _read_vocabulary(folder / VOCABULARY)
    state = _read_state(folder / MODEL)
    network = _build(folder, config, tokenizer)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _corrupt(folder / MODEL, f"it does not fit {CONFIG}: {_first_line(error)}") from error
    for name, parameter in network.state_dict().items():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise _corrupt(folder / MODEL, f"'{name}' holds values that are not numbers")
    # Xtts.eval would also build the wrapper for transformers' generate().
    nn.Module.eval(network).requires_grad_(False)
    _fold_weight_norm(network.hifigan_decoder)
    speakers = _read_speakers(folder / SPEAKERS, config) if (folder / SPEAKERS).is_file() else {}
    return XttsModel(network, tokenizer, config, _fingerprint(state, config), speakers)


def _corrupt(file: Path, reason: str) -> ModelCorrupt:
    return ModelCorrupt(
        f"{file} is not a usable file of XTTS-v2: {reason}.",
        next_step="Remove it and run 'voice-clone models pull xtts'.",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of load_state_dict only says that there are errors.
    return (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def _read_config(file: Path) -> XttsConfig:
    config = XttsConfig()
    try:
        config.load_json(str(file))
        arguments = config.model_args
        fits = arguments.gpt_use_perceiver_resampler and arguments.decoder_input_dim > 0
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _corrupt(file, _first_line(error)) from error
    if not fits:
        raise _corrupt(file, "it describes another model (XTTS-v1?)")
    return config


def _read_vocabulary(file: Path) -> VoiceBpeTokenizer:
    try:
        tokenizer = VoiceBpeTokenizer(vocab_file=file)
        missing = [name for name in ("[START]", "[STOP]") if tokenizer.tokenizer.token_to_id(name) is None]
    # The tokenizers library raises Exception itself.
    except Exception as error:
        raise _corrupt(file, _first_line(error)) from error
    if missing:
        raise _corrupt(file, f"it has no token {missing[0]}")
    return tokenizer


def _read_pickle(file: Path) -> Any:
    try:
        with _legacy_safe_globals():
            return torch.load(file, map_location="cpu", weights_only=True)
    # What a damaged or crafted pickle raises has no common class below Exception.
    except Exception as error:
        raise _corrupt(file, _first_line(error)) from error


def _read_state(file: Path) -> dict[str, Tensor]:
    checkpoint = _read_pickle(file)
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _corrupt(file, "it holds no model state")
    # A trainer writes the model under this name.
    state = {name.removeprefix("xtts."): value for name, value in state.items()}
    return {name: value for name, value in state.items() if not name.startswith(_UNUSED_PARTS)}


def _build(folder: Path, config: XttsConfig, tokenizer: VoiceBpeTokenizer) -> Any:
    arguments = config.model_args
    # As Xtts.init_models does once it has a tokenizer; done before, the model is built once instead of twice.
    arguments.gpt_number_text_tokens = tokenizer.get_number_tokens()
    arguments.gpt_start_text_token = tokenizer.tokenizer.token_to_id("[START]")
    arguments.gpt_stop_text_token = tokenizer.tokenizer.token_to_id("[STOP]")
    try:
        network = Xtts(config)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise _corrupt(folder / CONFIG, _first_line(error)) from error
    network.tokenizer = tokenizer
    return network


def _fold_weight_norm(decoder: nn.Module) -> None:
    # In place: a deep copy would share the parametrised class and break the original.
    for module in decoder.modules():
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")


def _read_speakers(file: Path, config: XttsConfig) -> dict[str, tuple[Tensor, Tensor]]:
    content = _read_pickle(file)
    width, size = config.model_args.gpt_n_model_channels, config.model_args.d_vector_dim
    try:
        return {
            str(name): (
                speaker["gpt_cond_latent"].float().reshape(-1, width),
                speaker["speaker_embedding"].float().reshape(size),
            )
            for name, speaker in content.items()
        }
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise _corrupt(file, _first_line(error)) from error


def _fingerprint(state: Mapping[str, Tensor], config: XttsConfig) -> str:
    settings = [config.gpt_cond_len, config.gpt_cond_chunk_len, config.max_ref_len, config.sound_norm_refs]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name in sorted(state):
        if name.startswith(_CONDITIONING_PARTS):
            digest.update(name.encode())
            digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

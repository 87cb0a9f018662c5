"""The published files as safetensors: ``python -m engines.gpt_sovits.convert FOLDER``. To be run once.

A checkpoint in Python's own format can run code when it is opened, and fine-tuned ones come from anywhere.
They are read here, outside the server, by torch's reader for tensors alone (``weights_only``), which
refuses anything else; what the engine loads cannot hold code at all. Beside each file its conversion is
written::

    s1v3.ckpt                               s1v3.safetensors                    configuration in the metadata
    v2Pro/s2Gv2ProPlus.pth                  v2Pro/s2Gv2ProPlus.safetensors      and the version
    chinese-hubert-base/pytorch_model.bin   chinese-hubert-base/model.safetensors
    sv/pretrained_eres2netv2w24s4ep4.ckpt   sv/pretrained_eres2netv2w24s4ep4.safetensors
    g2p/en/namedict_cache.pickle            g2p/en/namedict.json

and of ``chinese-roberta-wwm-ext-large``, if it is there, as of HuBERT.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engines.contract import EngineError, ModelCorrupt, ModelMissing
from engines.gpt_sovits.settings import GptSovitsConfig
from engines.gpt_sovits.text import BERT, NAMES

SPEAKER_ENCODER = "sv/pretrained_eres2netv2w24s4ep4"
HUBERT = "chinese-hubert-base"
#: Key of what a file says about itself, as JSON, in the metadata of its safetensors.
DESCRIPTION = "description"
_NAME_PICKLE = "g2p/en/namedict_cache.pickle"
#: Endings a published file may have.
_ENDINGS = (".ckpt", ".pth")
#: What newer versions put in place of "PK" at the beginning of a file.
_HEADS = {b"05": "v2Pro", b"06": "v2ProPlus"}
VERSIONS = ("v2", "v2Pro", "v2ProPlus")
#: Phones v2 knows; v1 has 322.
_PHONES = 732


class HParams:
    """Stands for upstream's ``utils.HParams``, of which a trained checkpoint keeps an object."""


def convert(folder: Path, gpt: str, sovits: str) -> list[Path]:
    """Write the safetensors of all published files in ``folder`` and return their paths.

    ``gpt`` and ``sovits`` as in the settings. Raises ``ModelMissing`` or ``ModelCorrupt``, naming the file.
    """
    written = [_convert_gpt(_published(folder, gpt)), _convert_sovits(_published(folder, sovits))]
    for name in (HUBERT, BERT):
        source = folder / name / "pytorch_model.bin"
        if source.is_file():
            written.append(_convert_transformer(source))
    encoder = (folder / SPEAKER_ENCODER).with_suffix(".ckpt")
    if encoder.is_file():
        written.append(_save(encoder, _tensors(encoder, _read(encoder)), {}))
    if (folder / _NAME_PICKLE).is_file():
        written.append(_convert_names(folder / _NAME_PICKLE, folder / NAMES))
    return written


def _published(folder: Path, name: str) -> Path:
    for ending in _ENDINGS:
        # Not with_suffix: names of fine-tuned weights have dots in them.
        file = folder / f"{name}{ending}"
        if file.is_file():
            return file
    raise ModelMissing(
        f"There is no {folder / name}{' or '.join(_ENDINGS)}.",
        next_step="Run 'voice-clone models pull gpt_sovits', or name your weights with --gpt and --sovits.",
    )


def _convert_gpt(file: Path) -> Path:
    content = _read(file)
    config = _plain(content.get("config"))
    if "hidden_dim" not in config.get("model", {}):
        raise _corrupt(file, "it has no configuration of a GPT")
    return _save(file, _tensors(file, content.get("weight")), {"config": config})


def _convert_sovits(file: Path) -> Path:
    content = _read(file)
    config, state = _plain(content.get("config")), _tensors(file, content.get("weight"))
    version = _version(file, config, state)
    config.setdefault("model", {})["version"] = version
    return _save(file, state, {"config": config, "version": version})


def _version(file: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """What the file's head or configuration says, or if they are silent what the weights tell."""
    named = _HEADS.get(file.open("rb").read(2)) or config.get("model", {}).get("version")
    phones = state.get("enc_p.text_embedding.weight")
    if phones is None or any(name.startswith(("cfm.", "bridge.")) for name in state):
        raise _corrupt(file, "it is no v2, v2Pro or v2ProPlus (v3 and v4 need upstream's own server)")
    if len(phones) != _PHONES:
        raise _corrupt(file, "it is of version v1, which only upstream's own server speaks")
    if "sv_emb.weight" in state:
        return named if named in ("v2Pro", "v2ProPlus") else "v2ProPlus"
    return "v2"


def _convert_transformer(file: Path) -> Path:
    """With transformers' own reader, which knows what layers were called when these were published."""
    from transformers import AutoModelForMaskedLM, HubertModel

    kind = HubertModel if file.parent.name == HUBERT else AutoModelForMaskedLM
    _read(file)
    try:
        model: Any = kind.from_pretrained(file.parent, local_files_only=True, use_safetensors=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _corrupt(file, _first_line(error)) from error
    model.save_pretrained(file.parent)
    return file.parent / "model.safetensors"


def _convert_names(source: Path, target: Path) -> Path:
    class NoCode(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise _corrupt(source, f"it asks for {module}.{name}; a list of names needs no code")

    try:
        names = NoCode(io.BytesIO(source.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise _corrupt(source, _first_line(error)) from error
    target.write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    return target


def _read(file: Path) -> Any:
    content = file.read_bytes()
    if content[:2] in _HEADS:
        content = b"PK" + content[2:]
    try:
        with torch.serialization.safe_globals([(HParams, "utils.HParams")]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # What a damaged or crafted pickle raises has no common class below Exception.
    except Exception as error:
        raise _corrupt(file, _first_line(error)) from error


def _tensors(file: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _corrupt(file, "it holds no weights")
    return state


def _plain(config: Any) -> dict[str, Any]:
    """Dictionaries in place of objects."""
    if isinstance(config, HParams):
        config = vars(config)
    if not isinstance(config, dict):
        return {}
    return {
        str(name): _plain(value) if isinstance(value, (dict, HParams)) else value
        for name, value in config.items()
    }


def _save(file: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    target = file.parent / f"{file.name.removesuffix(file.suffix)}.safetensors"
    draft = target.with_name(f"{target.name}.draft")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, draft, metadata={DESCRIPTION: json.dumps(description, default=str)})
    draft.replace(target)
    return target


def _corrupt(file: Path, reason: str) -> ModelCorrupt:
    return ModelCorrupt(
        f"{file} is not a usable file of GPT-SoVITS: {reason}.",
        next_step="Get it again (docs/gpt_sovits.md).",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def main(arguments: Iterable[str] | None = None) -> None:
    """Convert the folder named on the command line."""
    defaults = GptSovitsConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpt", default=defaults.gpt, help="GPT weights, without their ending")
    parser.add_argument("--sovits", default=defaults.sovits, help="SoVITS weights, without their ending")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    try:
        for file in convert(asked.folder, asked.gpt, asked.sovits):
            sys.stdout.write(f"{file}\n")
    except EngineError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

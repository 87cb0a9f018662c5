"""Base voices of coqui-tts: VITS models, read from a folder, on the CPU. Each has a licence of its own."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trainer.io import get_user_data_dir
from TTS.tts.configs.vits_config import VitsConfig
from TTS.tts.models.vits import Vits

from engines.contract import ModelCorrupt, ModelMissing, NothingToSpeak
from engines.openvoice.base_speaker import Sentence
from engines.openvoice.settings import VitsSettings
from engines.openvoice.silence import without_pauses

_SENTENCE_PAUSE_S = 0.22
_TORCH_SEEDS = 2**63


class VitsSpeaker:
    """A ``BaseSpeaker`` in this process."""

    speeds = (0.5, 2.0)

    def __init__(self, settings: VitsSettings) -> None:
        """Load the model. Raises ``ModelMissing`` or ``ModelCorrupt``."""
        folder = _folder(settings.model)
        config_path = _only(folder, "config.json")
        weights_path = _only(folder, "*.pth", "model_file.pth")
        try:
            config = VitsConfig()
            config.load_json(str(config_path))
            self._model = Vits(config)
            # coqui-tts reads it with weights_only: nothing in it is executed.
            self._model.load_checkpoint(config, weights_path, eval=True, strict=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise ModelCorrupt(
                f"{folder} holds no VITS model of coqui-tts that can be read: {str(error)[:300]}",
                next_step="Name the folder with its config.json and .pth file, or fetch it again.",
            ) from error
        except ImportError as error:
            raise ModelMissing(
                f"The VITS model in {folder} needs a phonemizer: {error}",
                next_step="Install it, or use another.",
            ) from error
        self._speaker = _speaker_id(self._model, settings)
        self.name = f"vits {settings.model}"
        self.languages = (settings.language,)
        self.sample_rate_hz = int(config.audio.sample_rate)
        digest = hashlib.sha256(config_path.read_bytes())
        digest.update(weights_path.read_bytes())
        self.identity = f"vits {digest.hexdigest()} {settings.speaker} {settings.language}"

    def speak(self, text: str, language: str, speed: float, seed: int) -> Iterator[Sentence]:
        """See ``BaseSpeaker``; the text is one piece."""
        tokenizer = self._model.tokenizer
        tokens = tokenizer.text_to_ids(text, language=language)
        if not any(character.isalnum() for character in text) or not tokens:
            raise NothingToSpeak(
                f"The text holds nothing that can be pronounced in '{language}'.",
                next_step="Give words or numbers.",
            )
        inputs: dict[str, Any] = {
            "x_lengths": None,
            "d_vectors": None,
            "language_ids": None,
            "durations": None,
        }
        inputs["speaker_ids"] = None if self._speaker is None else torch.tensor([self._speaker])
        # The model draws from torch's own generator, which others in this process use too.
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed % _TORCH_SEEDS)
            self._model.length_scale = 1.0 / speed
            sound = self._model.inference(torch.tensor([tokens]), inputs)["model_outputs"]
        samples = np.ascontiguousarray(sound[0, 0].numpy(), np.float32)
        yield Sentence(without_pauses(samples, self.sample_rate_hz), _SENTENCE_PAUSE_S)

    def close(self) -> None:
        """Nothing to give back."""


def _folder(model: str) -> Path:
    """The folder of ``model``, a path or a name as coqui-tts writes them. Raises ``ModelMissing``."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    downloaded = Path(get_user_data_dir("tts")) / model.replace("/", "--")
    if downloaded.is_dir():
        return downloaded
    raise ModelMissing(
        f"The VITS model '{model}' is neither a folder nor in {downloaded}.",
        next_step="Name its folder; or let coqui-tts download it once: "
        f"tts --model_name {model} --text hello --out_path hello.wav",
    )


def _only(folder: Path, pattern: str, preferred: str = "") -> Path:
    """The one file of ``folder`` that ``pattern`` means. Raises ``ModelMissing``."""
    if preferred and (folder / preferred).is_file():
        return folder / preferred
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ModelMissing(
            f"{folder} holds {len(found)} files {pattern}; a VITS model has one.",
            next_step="Leave one config.json and one .pth file in the folder.",
        )
    return found[0]


def _speaker_id(model: Vits, settings: VitsSettings) -> int | None:
    """The number of the wanted speaker; None for a model with one. Raises ``ModelMissing``."""
    manager = model.speaker_manager
    names = dict(manager.name_to_id) if manager is not None and model.num_speakers > 1 else {}
    if not names and settings.speaker is None:
        return None
    if settings.speaker not in names:
        raise ModelMissing(
            f"'{settings.model}' has no speaker '{settings.speaker}'.",
            next_step=f"Set `speaker` to one of: {', '.join(sorted(names)) or 'none, leave it out'}.",
        )
    return int(names[settings.speaker])

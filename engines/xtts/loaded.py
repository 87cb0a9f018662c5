"""Everything that exists once the model is loaded: its modules on their device, the running decode loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.contract import (
    Abandon,
    Chunk,
    ConditioningMismatch,
    EngineCard,
    EngineError,
    ModelCorrupt,
    ModelError,
    Reference,
    Utterance,
)
from engines.weights import require_licence
from engines.xtts import conditioning
from engines.xtts.decode_loop import DecodeLoop, is_out_of_memory
from engines.xtts.decoder import Decoder
from engines.xtts.linear import activation_type
from engines.xtts.memory import VOICE_LATENTS, cache_columns, require_room, slot_bytes
from engines.xtts.model_files import load_model
from engines.xtts.sampling import Sampling
from engines.xtts.settings import XttsConfig
from engines.xtts.speech import Order, Outbox
from engines.xtts.text import TextFrontEnd, installed_languages
from engines.xtts.vocoder import Vocoder

#: Audio tokens an utterance may take: so many, and so many for each character it is read as. Speech takes
#: about 1.3 a character; a multiple of that is a model that has lost its way.
_TOKENS_AT_LEAST, _TOKENS_PER_CHARACTER = 60, 4
_WARM_UP_TEXT = "Hello."


class LoadedXtts:
    """A checkpoint in memory, ready to speak. ``close`` ends its thread."""

    def __init__(self, settings: XttsConfig, card: EngineCard, folder: Path) -> None:
        """Raises ``ModelError`` (missing, corrupt, licence not accepted, no room, wrong device)."""
        self._device = _device(settings.device)
        _require_possible(settings, self._device)
        require_licence(card, folder, accepted=settings.accept_license)
        self._model = model = load_model(card, folder)
        network, config = model.network, model.config
        self.fingerprint = model.fingerprint
        self.languages = installed_languages()
        self._text = TextFrontEnd(model.tokenizer, config.model_args.gpt_max_text_tokens)
        self._width: int = network.gpt.model_dim
        self._trim_end = settings.trim_end
        self._defaults = Sampling(
            config.temperature, config.top_k, config.top_p, float(config.repetition_penalty)
        )
        self.slot_bytes = slot_bytes(network.gpt, settings.precision)
        require_room(settings.slots, self.slot_bytes, settings.cache_mb, self._device)
        try:
            decoder = Decoder(
                network.gpt,
                settings.slots,
                cache_columns(network.gpt),
                settings.precision,
                self._device,
                static=self._device.type == "cuda",
                graphs=settings.cuda_graphs,
            )
            # The decoder has its own copy of these; conditioning and vocoder need the rest.
            network.gpt.gpt = network.gpt.text_head = None
            network.to(self._device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"XTTS-v2 with {settings.slots} slots does not fit into the memory of {self._device}.",
                next_step="Set fewer slots, or precision: bf16.",
            ) from error
        self._max_tokens = decoder.max_tokens
        vocoder = Vocoder(network.hifigan_decoder, activation_type(settings.vocoder_precision))
        self.loop = DecodeLoop(
            decoder,
            vocoder,
            settings.slots,
            settings.window_tokens,
            self._device,
            config.model_args.output_sample_rate,
            settings.threads,
        )
        try:
            self._warm_up()
        except BaseException:
            self.close()
            raise

    @property
    def speakers(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """Conditioning arrays of the speakers that come with the model."""
        return {
            name: conditioning.arrays(latents, embedding)
            for name, (latents, embedding) in self._model.speakers.items()
        }

    def close(self) -> None:
        """End the decode loop."""
        self.loop.close()

    def extract_voice(self, reference: Reference, min_reference_s: float) -> dict[str, NDArray[Any]]:
        """See ``conditioning.extract_voice``."""
        return conditioning.extract_voice(self._model, reference, min_reference_s)

    @staticmethod
    def new_outbox() -> Outbox:
        """Where the audio of one batch is collected."""
        return SimpleQueue()

    def order(self, row: int, utterance: Utterance, leave: Abandon, outbox: Outbox) -> Order:
        """``utterance`` for the decode loop. Raises ``UtteranceError`` or ``ConditioningMismatch``."""
        arrays = utterance.conditioning.arrays
        latents, embedding = arrays.get(conditioning.LATENTS), arrays.get(conditioning.EMBEDDING)
        if (
            latents is None
            or embedding is None
            or latents.shape != (VOICE_LATENTS, self._width)
            or embedding.shape != (self._model.config.model_args.d_vector_dim,)
        ):
            raise ConditioningMismatch(
                "The conditioning of this voice does not have the shape of this model.",
                next_step="Extract it again from the reference recording.",
            )
        sampling = self._defaults.changed(utterance.options)
        tokens, characters = self._text.tokens(utterance.text, utterance.language)
        return Order(
            row=row,
            text_tokens=tokens,
            latents=torch.from_numpy(np.array(latents, np.float32)),
            embedding=torch.from_numpy(np.array(embedding, np.float32)).to(self._device),
            sampling=sampling,
            seed=utterance.seed,
            speed=utterance.speed,
            max_tokens=min(self._max_tokens, _TOKENS_AT_LEAST + _TOKENS_PER_CHARACTER * characters),
            trim_end=self._trim_end,
            abandoned=(utterance.abandoned, leave),
            outbox=outbox,
        )

    def _warm_up(self) -> None:
        """Speak up to a first chunk: what is set up at first use is so now. Raises ``ModelError``."""
        outbox, enough = self.new_outbox(), Abandon()
        tokens, _ = self._text.tokens(_WARM_UP_TEXT, "en")
        order = Order(
            row=0,
            text_tokens=tokens,
            latents=torch.zeros(VOICE_LATENTS, self._width),
            embedding=torch.zeros(self._model.config.model_args.d_vector_dim, device=self._device),
            sampling=self._defaults,
            seed=0,
            speed=1.0,
            max_tokens=self._max_tokens,
            trim_end=False,
            abandoned=(enough,),
            outbox=outbox,
        )
        self.loop.submit([order])
        while isinstance(news := outbox.get(), Chunk) and not news.last:
            enough.set()
        if isinstance(news, Chunk) and news.error is not None:
            raise _warm_up_failure(news.error)


def _warm_up_failure(error: EngineError) -> ModelError:
    return ModelCorrupt(
        f"XTTS-v2 was read but cannot speak: {error.message}",
        next_step="Run 'voice-clone models verify xtts'; if its files are whole, use fewer slots.",
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"XTTS-v2 is to run on '{name}', but this process sees no CUDA device.",
            next_step="Set device: cpu, or give the replica a GPU (replicas.num_gpus).",
        )
    return torch.device(name)


def _require_possible(settings: XttsConfig, device: torch.device) -> None:
    asked = {settings.precision, settings.vocoder_precision}
    for precision in asked & ({"int8"} if device.type == "cuda" else {"fp16"}):
        raise ModelError(
            f"XTTS-v2 has no precision '{precision}' on {device.type}.",
            next_step="Use bf16 or fp32"
            + (" or fp16." if device.type == "cuda" else ", or int8 for the GPT."),
        )

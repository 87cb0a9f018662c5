"""GPT-SoVITS in this process: a checkpoint in memory and the loop that speaks with it.

Several calls of ``synthesize`` join one loop. Texts are read, and new voices listened to, in the caller's
thread, so that no one else's speech waits for them.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from engines.contract import (
    Abandon,
    Chunk,
    EngineCard,
    EngineError,
    ModelCorrupt,
    ModelError,
    Utterance,
    UtteranceTooLong,
)
from engines.gpt_sovits.options import Sampling
from engines.gpt_sovits.package import prepare_package
from engines.gpt_sovits.reference_window import SHORTEST_S
from engines.gpt_sovits.settings import GptSovitsConfig
from engines.gpt_sovits.voice import RATE_HZ, Voice

if TYPE_CHECKING:
    import torch

    from engines.gpt_sovits.decode_loop import DecodeLoop
    from engines.gpt_sovits.speech import Gone, Order, Outbox
    from engines.gpt_sovits.text import TextFrontEnd
    from engines.gpt_sovits.voice_features import VoiceReader

#: How long a call waits for audio before it says that work goes on.
_BEAT_S = 1.0
#: Tokens (40 ms) that speech takes for each phone, at most on average: room for that must be left in the
#: cache.
_TOKENS_PER_PHONE = 3
#: An utterance may take so many, and so many for each phone: a multiple of what speech takes is a model
#: that has lost its way.
_TOKENS_AT_LEAST, _MOST_TOKENS_PER_PHONE = 40, 8
_WARM_UP_TEXT = {"en": "Hello.", "zh": "你好。", "ja": "はい。"}


class InProcess:
    """The backend that runs the model here; ``backend.Backend`` says what its methods do."""

    sample_rate_hz = RATE_HZ

    def __init__(self, settings: GptSovitsConfig, card: EngineCard, folder: Path) -> None:
        self._settings, self._card, self._folder = settings, card, folder
        self._loop: DecodeLoop | None = None

    @property
    def concurrent_batches(self) -> int:
        """Any number of calls join one decode loop; more than there are slots would only wait in it."""
        return self._settings.slots

    @property
    def languages(self) -> tuple[str, ...]:
        """Those whose text data is loaded."""
        return self._settings.languages

    def load(self) -> None:
        """Read the checkpoint and the text data, start the decode loop and let it speak once."""
        prepare_package()
        from engines.gpt_sovits.checkpoint import load_checkpoint
        from engines.gpt_sovits.decode_loop import DecodeLoop
        from engines.gpt_sovits.decoder import Decoder
        from engines.gpt_sovits.text import TextFrontEnd
        from engines.gpt_sovits.vocoder import Vocoder
        from engines.gpt_sovits.voice_features import VoiceReader

        settings = self._settings
        device = _device(settings)
        checkpoint = load_checkpoint(self._card, self._folder, settings)
        self._text: TextFrontEnd = TextFrontEnd(self._folder, settings.languages, bert=settings.bert)
        for module in (checkpoint.sovits, checkpoint.hubert, checkpoint.speaker_encoder):
            if module is not None:
                module.to(device)
        decoder = Decoder(
            checkpoint.gpt,
            settings.slots,
            settings.kv_buckets,
            settings.precision,
            device,
            static=device.type == "cuda",
            graphs=settings.cuda_graphs and device.type == "cuda",
        )
        self._voices: VoiceReader = VoiceReader(checkpoint, self._text, device, most=settings.cached_voices)
        self._loop = DecodeLoop(
            decoder,
            Vocoder(checkpoint.sovits, device),
            settings.slots,
            settings.window_tokens,
            device,
            self.sample_rate_hz,
            settings.threads,
        )
        try:
            self._warm_up()
        except BaseException:
            self.unload()
            raise

    def unload(self) -> None:
        """End the decode loop and forget the weights."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()
            del self._text, self._voices

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """Have ``batch`` spoken by the decode loop, together with what other calls brought to it.

        While an utterance waits for a slot or its audio takes long, empty chunks say that the loop works.
        """
        loop = self._require_loop()
        outbox: Outbox = SimpleQueue()
        leave = Abandon()
        waiting: set[int] = set()
        turns = loop.turns
        try:
            for row, utterance in enumerate(batch):
                if utterance.abandoned.is_set():
                    continue
                try:
                    loop.submit([self._order(row, utterance, leave, outbox)])
                    waiting.add(row)
                except Exception as error:  # noqa: BLE001 - it is this utterance that failed, the others go on
                    yield Chunk.failure(row, _as_engine_error(error))
                # One is heard already while the next is read: a new voice takes its time.
                while not outbox.empty():
                    yield from _told(outbox.get(), waiting)
            while waiting:
                try:
                    news = outbox.get(timeout=_BEAT_S)
                except queue.Empty:
                    if loop.turns != turns:
                        turns = loop.turns
                        yield Chunk(min(waiting), np.zeros(0, np.float32), last=False)
                    continue
                yield from _told(news, waiting)
        finally:
            leave.set()

    def _order(self, row: int, utterance: Utterance, leave: Abandon, outbox: Outbox) -> Order:
        """``utterance`` for the decode loop. Raises ``UtteranceError`` or ``ConditioningMismatch``."""
        from engines.gpt_sovits.speech import Order
        from engines.gpt_sovits.text import Phones

        sampling = Sampling.of(utterance.options)
        voice = Voice.from_arrays(utterance.conditioning.arrays)
        spoken = self._text.phones(utterance.text, utterance.language)
        features = self._voices.features(voice)
        columns = self._settings.kv_buckets[-1]
        count = len(spoken.ids)
        room = columns - len(features.phones.ids) - count - len(features.tokens)
        if room < _TOKENS_PER_PHONE * count:
            raise UtteranceTooLong(
                f"The text has {count} phones; after the voice's recording there is room for "
                f"{max(0, room + count) // (_TOKENS_PER_PHONE + 1)}.",
                next_step="Split the text, enrol a shorter recording, or set greater kv_buckets.",
            )
        bert = None
        if spoken.bert is not None or features.phones.bert is not None:
            import torch

            bert = torch.cat([features.phones.features, spoken.features])
        return Order(
            row=row,
            phones=Phones([*features.phones.ids, *spoken.ids], bert),
            spoken_phones=spoken.ids,
            prompt=features.tokens,
            colour=features.colour,
            sampling=sampling,
            seed=utterance.seed,
            speed=utterance.speed,
            max_tokens=min(room, _TOKENS_AT_LEAST + _MOST_TOKENS_PER_PHONE * count),
            pause_samples=round(self._settings.pause_s * self.sample_rate_hz / utterance.speed),
            abandoned=(utterance.abandoned, leave),
            outbox=outbox,
        )

    def _warm_up(self) -> None:
        """Listen, and speak up to a first chunk: sets up what first use would. Raises ``ModelError``."""
        from engines.contract import Conditioning

        noise = np.random.default_rng(0).normal(0, 0.05, round(SHORTEST_S * RATE_HZ)).astype(np.float32)
        language = self.languages[0]
        text = _WARM_UP_TEXT[language]
        voice = Conditioning(self._card.name, "", Voice(noise, text, language).to_arrays())
        for chunk in self.synthesize([Utterance(text, language, voice, seed=0)]):
            if chunk.error is not None:
                raise ModelCorrupt(
                    f"GPT-SoVITS was read but cannot speak: {chunk.error.message}",
                    next_step="Get the published files again and convert them, or set fewer slots.",
                ) from chunk.error
            if len(chunk.samples):
                break

    def _require_loop(self) -> DecodeLoop:
        if self._loop is None:
            raise ModelError("The gpt_sovits engine is not loaded.", next_step="Call load() first.")
        return self._loop


def _told(news: Chunk | Gone, waiting: set[int]) -> Iterator[Chunk]:
    """What the caller hears of ``news``; whose row has ended by it is not waited for any more."""
    if not isinstance(news, Chunk) or news.last:
        waiting.discard(news.row)
    if isinstance(news, Chunk):
        yield news


def _as_engine_error(error: Exception) -> EngineError:
    from engines.gpt_sovits.decode_loop import as_engine_error

    return as_engine_error(error)


def _device(settings: GptSovitsConfig) -> torch.device:
    """The device that ``settings`` mean. Raises ``ModelError`` if it is not there or cannot do it."""
    import torch

    wanted, precision = settings.device, settings.precision
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"There is no GPU {device} here: torch {torch.__version__} sees {torch.cuda.device_count()}.",
            next_step="Reserve one (engines.gpt_sovits.replicas.num_gpus: 1) or set device: cpu.",
        )
    if (precision == "int8" and device.type == "cuda") or (precision == "fp16" and device.type == "cpu"):
        raise ModelError(
            f"GPT-SoVITS has no precision '{precision}' on {device.type}.",
            next_step="Use bf16 or fp32" + (" or fp16." if device.type == "cuda" else " or int8."),
        )
    return device

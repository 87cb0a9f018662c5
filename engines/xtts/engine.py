"""The door to the XTTS-v2 engine: the contract of ``engines.contract`` over the modules beside this file.

Nothing here imports torch before ``load``: the class is read wherever a configuration is checked.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from engines.contract import (
    Abandon,
    Chunk,
    Conditioning,
    Engine,
    EngineCard,
    EngineConfig,
    EngineError,
    ModelError,
    Reference,
    Utterance,
)
from engines.coqui import prepare_coqui
from engines.weights import weights_dir
from engines.xtts.languages import EXTRA, LANGUAGES, MAX_CHARS, REQUIRED_PACKAGES
from engines.xtts.settings import XttsConfig

if TYPE_CHECKING:
    from engines.xtts.loaded import LoadedXtts

_NAME = "xtts"
#: How long a call waits for audio before it says that work goes on.
_BEAT_S = 1.0


class XttsEngine(Engine):
    """XTTS-v2: 17 languages in the voice of a short recording, streamed, many utterances at once."""

    card: ClassVar[EngineCard] = EngineCard(
        name=_NAME,
        summary="XTTS-v2: 17 languages in the voice of a short recording; weights for non-commercial use.",
        languages=LANGUAGES,
        optional_languages={EXTRA: tuple(REQUIRED_PACKAGES)},
        sample_rate_hz=24_000,
        max_utterance_chars=MAX_CHARS,
        streams=True,
        needs_transcript=False,
        code_licence="Apache-2.0",
        weights_licence="Coqui Public Model License 1.0.0 (non-commercial)",
        hardware="GPU, or CPU cores with patience; 2 GB and 0.26 GB a slot",
        min_reference_s=1.5,
        max_reference_s=30.0,
        options=("temperature", "top_k", "top_p", "repetition_penalty"),
    )
    Config: ClassVar[type[EngineConfig]] = XttsConfig

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.settings = config if isinstance(config, XttsConfig) else XttsConfig(**config.model_dump())
        self._loaded: LoadedXtts | None = None

    @property
    def concurrent_batches(self) -> int:
        """Any number of calls join one decode loop; more than there are slots would only wait in it."""
        return self.config.slots

    @property
    def weights_fingerprint(self) -> str:
        """Hash of the conditioning encoders and their settings; a fine-tuned decoder keeps its voices."""
        return self._require_loaded().fingerprint

    @property
    def languages(self) -> tuple[str, ...]:
        """17 less those whose packages are not installed."""
        return self._require_loaded().languages

    @property
    def built_in_voices(self) -> Mapping[str, Conditioning]:
        """The speakers of ``speakers_xtts.pth``."""
        return {
            name: Conditioning(_NAME, self.weights_fingerprint, arrays)
            for name, arrays in self._require_loaded().speakers.items()
        }

    def load(self) -> None:
        """Read the checkpoint, fit the slots into memory, start the decode loop and let it speak once."""
        self.unload()
        prepare_coqui("xtts")
        from engines.xtts.loaded import LoadedXtts

        self._loaded = LoadedXtts(self.settings, self.card, self.settings.model_dir or weights_dir(_NAME))

    def unload(self) -> None:
        """End the decode loop and forget the weights."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()

    def extract_voice(self, reference: Reference) -> Conditioning:
        """Latents and embedding of the first 30 seconds. Raises ``ReferenceUnusable``."""
        loaded = self._require_loaded()
        arrays = loaded.extract_voice(reference, self.card.min_reference_s)
        return Conditioning(_NAME, loaded.fingerprint, arrays)

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """Have ``batch`` spoken by the decode loop, together with what other calls brought to it.

        While an utterance waits for a slot or its audio takes long, empty chunks say that the loop works.
        """
        loaded = self._require_loaded()
        outbox = loaded.new_outbox()
        leave, orders, waiting = Abandon(), [], set()
        for row, utterance in enumerate(batch):
            try:
                self.check_utterance(utterance)
                orders.append(loaded.order(row, utterance, leave, outbox))
                waiting.add(row)
            except EngineError as error:
                yield Chunk.failure(row, error)
        try:
            loaded.loop.submit(orders)
            turns = loaded.loop.turns
            while waiting:
                try:
                    news = outbox.get(timeout=_BEAT_S)
                except queue.Empty:
                    if loaded.loop.turns != turns:
                        turns = loaded.loop.turns
                        yield Chunk(min(waiting), np.zeros(0, np.float32), last=False)
                    continue
                if not isinstance(news, Chunk):
                    waiting.discard(news.row)
                    continue
                if news.last:
                    waiting.discard(news.row)
                yield news
        finally:
            leave.set()

    def _require_loaded(self) -> LoadedXtts:
        if self._loaded is None:
            raise ModelError("The xtts engine is not loaded.", next_step="Call load() first.")
        return self._loaded

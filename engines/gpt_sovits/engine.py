"""The door to the GPT-SoVITS engine: the contract of ``engines.contract`` over a backend.

Nothing here imports torch before ``load``: the class is read wherever a configuration is checked.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import soxr

from engines.contract import (
    Chunk,
    Conditioning,
    Engine,
    EngineCard,
    EngineConfig,
    EngineError,
    Reference,
    Samples,
    Utterance,
)
from engines.gpt_sovits.backend import Backend
from engines.gpt_sovits.in_process import InProcess
from engines.gpt_sovits.options import OPTIONS
from engines.gpt_sovits.reference_window import LONGEST_S, SHORTEST_S
from engines.gpt_sovits.remote import RemoteBackend
from engines.gpt_sovits.settings import GptSovitsConfig
from engines.gpt_sovits.voice import FINGERPRINT, RATE_HZ, extract_voice
from engines.weights import weights_dir

_NAME = "gpt_sovits"


class GptSovitsEngine(Engine):
    """GPT-SoVITS: Chinese, Japanese and English in the voice and manner of 3 to 10 seconds of a speaker."""

    card: ClassVar[EngineCard] = EngineCard(
        name=_NAME,
        summary="GPT-SoVITS: Chinese, Japanese and English in the manner of a few seconds of a voice.",
        languages=("en", "zh", "ja"),
        sample_rate_hz=RATE_HZ,
        # With a reference of 10 s, speech of this much text still fits into 1024 columns of attention cache.
        max_utterance_chars={"en": 160, "ja": 60, "zh": 60, "*": 60},
        streams=True,
        needs_transcript=True,
        transcript_optional=True,
        code_licence="MIT",
        weights_licence="MIT",
        hardware="GPU, or CPU cores with patience; 2.5 GB and 0.1 GB a slot",
        min_reference_s=SHORTEST_S,
        max_reference_s=LONGEST_S,
        options=OPTIONS,
    )
    Config: ClassVar[type[EngineConfig]] = GptSovitsConfig

    def __init__(self, config: EngineConfig) -> None:
        settings = config if isinstance(config, GptSovitsConfig) else GptSovitsConfig(**config.model_dump())
        if settings.remote is not None:
            settings = settings.model_copy(update={"slots": len(settings.remote.urls)})
        super().__init__(settings)
        self.settings = settings
        self._backend: Backend = (
            InProcess(settings, self.card, settings.model_dir or weights_dir(_NAME))
            if settings.remote is None
            else RemoteBackend(settings.remote)
        )

    @property
    def concurrent_batches(self) -> int:
        """As many as the backend joins."""
        return self._backend.concurrent_batches

    @property
    def weights_fingerprint(self) -> str:
        """Of how a reference is cut: conditioning holds audio and words, which depend on no weights."""
        return FINGERPRINT

    @property
    def languages(self) -> tuple[str, ...]:
        """What the backend speaks."""
        return self._backend.languages

    def load(self) -> None:
        """Get the backend ready, and let it speak once."""
        self.unload()
        self._backend.load()

    def unload(self) -> None:
        """Give back what the backend holds."""
        self._backend.unload()

    def extract_voice(self, reference: Reference) -> Conditioning:
        """3 to 10 seconds of ``reference`` and the words in them. Raises ``ReferenceUnusable``."""
        return Conditioning(_NAME, FINGERPRINT, extract_voice(reference).to_arrays())

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """Speak ``batch`` with the backend, less what the card forbids."""
        rows, accepted = [], []
        for row, utterance in enumerate(batch):
            try:
                self.check_utterance(utterance)
            except EngineError as error:
                yield Chunk.failure(row, error)
                continue
            rows.append(row)
            accepted.append(utterance)
        if accepted:
            stream = self._backend.synthesize(accepted)
            rates = [_AtRate(self._backend.sample_rate_hz, RATE_HZ) for _ in accepted]
            try:
                for chunk in stream:
                    if chunk.error is None:
                        samples = rates[chunk.row](chunk.samples, last=chunk.last)
                        chunk = replace(chunk, samples=samples)
                    yield replace(chunk, row=rows[chunk.row])
            finally:
                if isinstance(stream, Generator):
                    stream.close()


class _AtRate:
    """Samples of one row at the engine's rate: servers of v3 and v4 speak at others."""

    def __init__(self, source_hz: int, target_hz: int) -> None:
        self._stream = (
            None if source_hz == target_hz else soxr.ResampleStream(source_hz, target_hz, 1, dtype="float32")
        )

    def __call__(self, samples: Samples, *, last: bool) -> Samples:
        if self._stream is None:
            return samples
        resampled: Samples = self._stream.resample_chunk(samples, last=last)
        return resampled

"""What stands behind the engine: something that speaks with a voice given as a few seconds of audio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from engines.contract import Chunk, Utterance


class Backend(Protocol):
    """One way to run GPT-SoVITS.

    The conditioning of every utterance holds what ``engines.gpt_sovits.voice`` describes and nothing else, so
    a voice enrolled with one backend is spoken by the other.
    """

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the samples. Valid after ``load``."""

    @property
    def languages(self) -> tuple[str, ...]:
        """BCP-47 primary subtags of what is spoken. Valid after ``load``."""

    @property
    def concurrent_batches(self) -> int:
        """How many ``synthesize`` calls may run at the same time. Valid before ``load``."""

    def load(self) -> None:
        """Get ready to speak. Raises ``ModelError``."""

    def unload(self) -> None:
        """Give everything back."""

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """As ``Engine.synthesize``, of utterances the engine has checked."""

"""What says the text before the converter gives it the enrolled voice's colour.

A base speaker brings everything that is not cloned: language, accent, rhythm, intonation. Each kind is a
module beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from engines.contract import Samples


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, or a clause of a long one: ``samples`` [n] and the silence that belongs behind them."""

    samples: Samples
    pause_s: float


class BaseSpeaker(Protocol):
    """One voice of one synthesiser. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """What logs and pages call it."""

    @property
    def identity(self) -> str:
        """A text that differs for everything that sounds different: software, version, weights."""

    @property
    def languages(self) -> tuple[str, ...]:
        """BCP-47 primary subtags it speaks."""

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the samples of ``speak``."""

    @property
    def speeds(self) -> tuple[float, float]:
        """Slowest and fastest pace it has itself; 1.0, its own, is between them."""

    def speak(self, text: str, language: str, speed: float, seed: int) -> Iterator[Sentence]:
        """``text`` sentence by sentence, each as soon as it exists and without silence around it.

        The same arguments give the same samples. ``seed`` is not negative. Raises ``NothingToSpeak``, before
        the first sentence, if the text holds nothing it can pronounce, and ``SynthesisFailed``.
        """

    def close(self) -> None:
        """Give back what it holds."""

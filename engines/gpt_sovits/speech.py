"""One utterance on its way from tokens to samples. Touched by the decode loop only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
from torch import Tensor

from engines.contract import Abandon, Chunk, EngineError, Samples
from engines.gpt_sovits.onset import Onset
from engines.gpt_sovits.options import Sampling
from engines.gpt_sovits.text import Phones
from engines.gpt_sovits.vocoder import Voicing


@dataclass(frozen=True, slots=True)
class Gone:
    """Closes an utterance that nobody waits for."""

    row: int


Outbox = SimpleQueue[Chunk | Gone]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be spoken, and where to."""

    row: int
    #: Phones of the transcript and the text, and of the text alone.
    phones: Phones
    spoken_phones: list[int]
    #: Semantic tokens [n] of the reference; colour [1, width, 1] of the voice.
    prompt: Tensor
    colour: Tensor
    sampling: Sampling
    seed: int
    speed: float
    #: Tokens after which the utterance is ended if it does not end itself.
    max_tokens: int
    #: Silent samples after its last sound.
    pause_samples: int
    #: Set when nobody waits for it, or for its whole batch.
    abandoned: tuple[Abandon, ...]
    outbox: Outbox

    @property
    def unwanted(self) -> bool:
        """True if nobody waits for it any more."""
        return any(flag.is_set() for flag in self.abandoned)


@dataclass(eq=False)
class Speech:
    """The state of an order that is being spoken."""

    order: Order
    voicing: Voicing
    #: Tokens after which each window is cut; the last size repeats. Cuts follow the count of tokens alone: so
    #: windows, and with them every bit of the samples, are the same under any load.
    window_tokens: Sequence[int]
    onset: Onset = field(default_factory=Onset)
    tokens: list[int] = field(default_factory=list)
    #: True once no further token comes, and True if it did not stop by itself.
    decoded: bool = False
    ran_away: bool = False
    closed: bool = False
    _cuts: deque[int] = field(default_factory=deque)
    _next_cut: int = 0
    _windows: int = 0
    #: When what was sent will have been heard by somebody who listens at once.
    _heard_at_s: float = 0.0

    def __post_init__(self) -> None:
        self._next_cut = self.window_tokens[0]

    def add(self, token: int, end_token: int) -> None:
        """The next token. The end itself is not spoken."""
        if token == end_token:
            self._end()
            return
        self.tokens.append(token)
        count = len(self.tokens)
        if count >= self.order.max_tokens:
            self.ran_away = True
            self._end()
        elif count >= self._next_cut:
            self._cuts.append(count)
            self._windows += 1
            self._next_cut += self.window_tokens[min(self._windows, len(self.window_tokens) - 1)]

    def _end(self) -> None:
        self.decoded = True
        self._cuts.append(len(self.tokens))

    @property
    def due(self) -> bool:
        """True if a window waits to be spoken."""
        return bool(self._cuts)

    @property
    def urgency_s(self) -> float:
        """Least is first: who has not been heard yet, then whose listener runs out of audio first."""
        return self._heard_at_s

    def take_window(self) -> tuple[list[int], bool]:
        """Tokens up to the next cut, and whether it is the last."""
        cut = self._cuts.popleft()
        return self.tokens[:cut], self.decoded and not self._cuts

    def chunk(self, samples: Samples, last: bool, sample_rate_hz: int) -> Chunk:
        """What may be heard once ``samples``, of the window taken before, are there."""
        samples = self.onset.push(samples)
        if last:
            samples = np.concatenate([samples, np.zeros(self.order.pause_samples, np.float32)])
        self._heard_at_s = max(self._heard_at_s, time.monotonic()) + len(samples) / sample_rate_hz
        self.closed = last
        return Chunk(self.order.row, samples, last)

    def fail(self, error: EngineError) -> None:
        """End it with ``error``."""
        self.closed = True
        self.order.outbox.put(Chunk.failure(self.order.row, error))

    def leave(self) -> None:
        """End it without a word: nobody waits."""
        self.closed = True
        self.order.outbox.put(Gone(self.order.row))

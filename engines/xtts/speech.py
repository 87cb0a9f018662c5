"""One utterance on its way from tokens to samples. Touched by the decode loop only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from engines.contract import Abandon, Chunk, EngineError, Samples
from engines.xtts.ending import Ending
from engines.xtts.sampling import Sampling
from engines.xtts.vocoder import Stretch, Vocoder, Window


@dataclass(frozen=True, slots=True)
class Gone:
    """Closes an utterance that nobody waits for."""

    row: int


Outbox = SimpleQueue[Chunk | Gone]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be spoken, and where to."""

    row: int
    text_tokens: Sequence[int]
    #: Conditioning of the voice: [32, width] and [512].
    latents: Tensor
    embedding: Tensor
    sampling: Sampling
    seed: int
    speed: float
    #: Audio tokens after which the utterance is ended if it does not end itself.
    max_tokens: int
    #: Cut silence and noise after the last sound.
    trim_end: bool
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
    stretch: Stretch
    #: Tokens after which each window is cut; the last size repeats. Cuts follow the count of tokens alone: so
    #: windows, and with them every bit of the samples, are the same under any load.
    window_tokens: Sequence[int]
    ending: Ending
    tokens: list[int] = field(default_factory=list)
    #: True once no further token comes, and True if it did not stop by itself.
    decoded: bool = False
    ran_away: bool = False
    closed: bool = False
    _latents: list[Tensor] = field(default_factory=list)
    _cuts: deque[int] = field(default_factory=deque)
    _next_cut: int = 0
    _windows: int = 0
    _frames: int = 0
    #: When what was sent will have been heard by somebody who listens at once.
    _heard_at_s: float = 0.0

    def __post_init__(self) -> None:
        self._next_cut = self.window_tokens[0]

    def add(self, token: int, latent: Tensor, stop_token: int) -> None:
        """The next audio token and the latent it is spoken from."""
        self.tokens.append(token)
        self._latents.append(latent)
        count = len(self.tokens)
        self.ran_away = token != stop_token and count >= self.order.max_tokens
        self.decoded = token == stop_token or self.ran_away
        if self.decoded:
            self._cuts.append(count)
        elif count >= self._next_cut:
            self._cuts.append(count)
            self._windows += 1
            self._next_cut += self.window_tokens[min(self._windows, len(self.window_tokens) - 1)]

    @property
    def due(self) -> bool:
        """True if a window waits to be vocoded."""
        return bool(self._cuts)

    @property
    def urgency_s(self) -> float:
        """Least is first: who has not been heard yet, then whose listener runs out of audio first."""
        return self._heard_at_s

    def take_window(self) -> tuple[Window | None, bool]:
        """The next window, if the tokens up to its cut determine any frame, and whether it is the last."""
        cut = self._cuts.popleft()
        last = self.decoded and not self._cuts
        latents = torch.stack(self._latents[:cut]).float()
        window = Vocoder.window(self.stretch, latents, self._frames, ended=last)
        if window is not None:
            self._frames = window.last
        return window, last

    def chunk(self, samples: Samples, last: bool, sample_rate_hz: int) -> Chunk:
        """What may be heard once ``samples``, of the window taken before, are there."""
        if self.order.trim_end:
            samples = self.ending.push(samples)
            if self.ending.passed and not last:
                self.ran_away = last = True
            if last:
                samples = np.concatenate([samples, self.ending.finish()])
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

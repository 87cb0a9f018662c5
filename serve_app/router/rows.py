"""An utterance's audio while it comes into being, and the row that brings it about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import numpy as np

from engines.contract import Samples
from serve_app.errors import VoiceCloneError
from serve_app.protocol import UtteranceCall
from serve_app.router.fair_queue import Tier


class Recording:
    """The audio of one utterance: grows until it is ended, and is heard by any number of listeners.

    All of it is held until it is let go. That is at most one utterance, whose length the engine's card
    bounds: a slow listener delays nobody else, and a later one hears it from the beginning.
    """

    def __init__(self) -> None:
        self.pieces: list[Samples] = []
        self.ended = False
        self.error: VoiceCloneError | None = None
        #: Samples so far.
        self.received = 0
        self._listeners = 0
        self._news: set[asyncio.Event] = set()
        self._when_done: list[Callable[[], None]] = []

    @classmethod
    def of(cls, samples: Samples) -> Recording:
        """A finished recording."""
        recording = cls()
        recording.add(samples)
        recording.end()
        return recording

    @property
    def left(self) -> bool:
        """True if nobody listens."""
        return not self._listeners

    def join(self) -> Listener:
        """Listen from the beginning. Every listener has to ``leave``."""
        self._listeners += 1
        return Listener(self)

    def add(self, samples: Samples) -> None:
        """The next samples, [n] float32."""
        self.pieces.append(samples)
        self.received += len(samples)
        self._wake()

    def end(self, error: VoiceCloneError | None = None) -> None:
        """No more samples; with ``error`` because the utterance failed."""
        self.ended, self.error = True, error
        self._wake()
        self._done()

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once: at the end, or when the last listener leaves before it."""
        self._when_done.append(callback)

    def _wake(self) -> None:
        for event in self._news:
            event.set()

    def _leave(self) -> None:
        self._listeners -= 1
        if self.left and not self.ended:
            self._done()

    def _done(self) -> None:
        callbacks, self._when_done = self._when_done, []
        for callback in callbacks:
            callback()


class Listener:
    """One reader of a recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._next = 0
        self._heard = 0
        self._left = False

    @property
    def unheard(self) -> int:
        """Samples that wait to be read."""
        return self._recording.received - self._heard

    async def __aiter__(self) -> AsyncGenerator[Samples, None]:
        """Samples as they come, all there are in one piece. Raises what the recording ended with."""
        recording = self._recording
        news = asyncio.Event()
        recording._news.add(news)
        try:
            while True:
                news.clear()
                pieces = recording.pieces[self._next :]
                if pieces:
                    self._next += len(pieces)
                    self._heard += sum(map(len, pieces))
                    yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
                elif recording.error is not None:
                    raise recording.error
                elif recording.ended:
                    return
                else:
                    await news.wait()
        finally:
            recording._news.discard(news)

    def leave(self) -> None:
        """Done with the recording, heard or not. Idempotent."""
        if not self._left:
            self._left = True
            self._recording._leave()


@dataclass(eq=False)
class Row(Recording):
    """One utterance in an engine's queue or on a replica."""

    call: UtteranceCall
    client: str = ""
    weight: float = 1.0
    tier: Tier = Tier.FIRST
    #: What must be equal in one batch.
    group: tuple[object, ...] = ()
    tries: int = 0
    #: Replica that failed on it last: the next try is somewhere else.
    avoid: str | None = None
    #: True after the engine ran out of memory: the next try is a batch of its own.
    alone: bool = False
    _skip: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        Recording.__init__(self)

    @property
    def cost(self) -> float:
        """What it is charged and batched by, in characters."""
        return float(len(self.call.text))

    def deliver(self, samples: Samples) -> None:
        """Samples from a replica; those an earlier try has delivered already are skipped."""
        fresh = samples[self._skip :]
        self._skip -= len(samples) - len(fresh)
        if len(fresh):
            self.add(fresh)

    def restart(self, failed_on: str | None) -> None:
        """Another replica speaks the whole utterance again, unheard up to where the last one came."""
        self._skip = self.received
        self.avoid = failed_on

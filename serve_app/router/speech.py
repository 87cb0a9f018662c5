"""One request's utterances: several at once within its look-ahead, heard in order.

The look-ahead is bounded in utterances and in seconds of audio the listener has not taken yet. So a slow
reader stops its own look-ahead and nobody else's, and the router holds for one request at most
``look_ahead_s`` of audio on its way to the listener plus ``look_ahead_utterances`` whole utterances.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

from engines.contract import Samples
from serve_app.errors import ListenerStalled
from serve_app.router.rows import Listener


class Playback:
    """How far a listener is behind what was sent, in samples."""

    def __init__(self, sample_rate_hz: int, *, reports: bool) -> None:
        """``reports``: the listener says what it has taken; without, everything sent counts as taken."""
        self._rate_hz = sample_rate_hz
        self._reports = reports
        self._sent = 0
        self._heard = 0
        self._moved = asyncio.Event()
        self._began_s: float | None = None
        self._gap_s = 0.0

    def seconds(self, samples: int) -> float:
        """Length of ``samples``."""
        return samples / self._rate_hz

    @property
    def sent_s(self) -> float:
        """Seconds of audio sent so far."""
        return self.seconds(self._sent)

    @property
    def unheard_s(self) -> float:
        """Seconds sent that the listener has not taken yet."""
        return self.seconds(self._sent - self._heard) if self._reports else 0.0

    @property
    def gap_s(self) -> float:
        """Seconds of silence that a listener in real time has heard between chunks."""
        return self._gap_s

    def send(self, samples: Samples) -> None:
        """``samples`` are on their way."""
        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        self._gap_s = max(self._gap_s, now_s - self._began_s - self.sent_s)
        self._sent += len(samples)

    def heard(self, samples: int) -> None:
        """The listener has taken ``samples`` in all. Reports may come late and out of order."""
        self._heard = max(self._heard, samples)
        self._moved.set()

    async def room(self, max_unheard_s: float, stall_timeout_s: float) -> None:
        """Wait until less than ``max_unheard_s`` is on its way. Raises ``ListenerStalled``."""
        asked_s = time.monotonic()
        while self.unheard_s >= max_unheard_s:
            self._moved.clear()
            try:
                async with asyncio.timeout(stall_timeout_s):
                    await self._moved.wait()
            except TimeoutError as error:
                raise ListenerStalled(
                    f"Nothing was read for {stall_timeout_s:g} s. Read faster, or send the text in parts."
                ) from error
        if self._began_s is not None:
            # A pause of the listener's own making is no gap.
            self._began_s += time.monotonic() - asked_s


class Speech:
    """The utterances of one request."""

    def __init__(
        self,
        utterances: int,
        listen: Callable[[int], Listener],
        playback: Playback,
        *,
        look_ahead_utterances: int,
        look_ahead_s: float,
        stall_timeout_s: float,
    ) -> None:
        """``listen(index)`` has utterance ``index`` spoken; it is called in order, ahead of need."""
        self._utterances = utterances
        self._listen = listen
        self._playback = playback
        self._look_ahead_utterances = look_ahead_utterances
        self._look_ahead_s = look_ahead_s
        self._stall_timeout_s = stall_timeout_s
        self._ahead: deque[Listener] = deque()
        self._asked = 0
        self._heard = 0

    @property
    def utterance(self) -> int:
        """Index of the utterance that the samples given out last belong to."""
        return self._heard

    async def parts(self) -> AsyncGenerator[Samples, None]:
        """All samples in order. Closing it leaves every utterance that is not heard to its end."""
        try:
            self._ask()
            while self._ahead:
                async for samples in self._ahead[0]:
                    await self._playback.room(self._look_ahead_s, self._stall_timeout_s)
                    self._playback.send(samples)
                    self._ask()
                    yield samples
                self._ahead.popleft().leave()
                self._heard += 1
                self._ask()
        finally:
            for listener in self._ahead:
                listener.leave()

    def _ask(self) -> None:
        """Ask for utterances until the look-ahead is full; the one that is heard next is always asked for."""
        while self._asked < self._utterances and len(self._ahead) < self._look_ahead_utterances:
            unread_s = self._playback.seconds(sum(listener.unheard for listener in self._ahead))
            if self._ahead and self._playback.unheard_s + unread_s >= self._look_ahead_s:
                return
            self._ahead.append(self._listen(self._asked))
            self._asked += 1

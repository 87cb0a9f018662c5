"""One turn of a live session: text that is still being written, and the speeches that are made of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from serve_app.errors import TooManyAtOnce, VoiceCloneError
from serve_app.handle import RouterHandle
from serve_app.ingress.speech import Frames, begin
from serve_app.ingress.speech_body import SpeechOptions
from serve_app.ingress.written_text import Granularity, WrittenText
from serve_app.protocol import OneShotReference, SpeechRequest, SpeechStarted

#: Stretches of one turn that are under way at once.
_AT_ONCE = 2
#: Distance of the seeds of two stretches: no utterance of one gets the seed of one of the other.
_SEED_STEP = 1 << 20
_SEED_LIMIT = 2**63


class Turn:
    """Text comes in, and stretches of it go out."""

    def __init__(
        self,
        index: int,
        config: SpeechOptions,
        reference: OneShotReference | None,
        granularity: Granularity,
    ) -> None:
        self.index = index
        self.config = config
        self.reference = reference
        #: Audio that was sent of it.
        self.sent_ms = 0.0
        #: An error has ended it; what is still written of it is dropped.
        self.failed = False
        #: Nothing more will be written of it.
        self.ended = False
        self._text = WrittenText(granularity, (config.language or "en").lower().split("-")[0])
        self._changed = asyncio.Event()

    @property
    def pending(self) -> int:
        """Characters that are not on their way to an engine yet."""
        return self._text.pending

    def write(self, text: str) -> None:
        """More text has come."""
        if not self.failed:
            self._text.add(text)
            self._changed.set()

    def flush(self) -> None:
        """Let what is there be spoken."""
        self._text.flush()
        self._changed.set()

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self.flush()

    def fail(self) -> None:
        """An error has ended it."""
        self.failed = True
        self._text.clear()

    async def stretch(self, max_chars: int) -> str:
        """The next stretch to speak; empty at the end of the turn."""
        while not (taken := self._text.take(max_chars)) and not self.ended:
            self._changed.clear()
            await self._changed.wait()
        return taken


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a turn whose first audio is there. Who has it closes ``frames``."""

    text: str
    started: SpeechStarted
    frames: Frames


@dataclass(frozen=True, slots=True)
class _Asked:
    """A stretch on its way."""

    request: SpeechRequest
    task: asyncio.Task[tuple[SpeechStarted, Frames]]


class Stretches:
    """The stretches of one turn, in order: the next is asked for while one is heard.

    All are spoken by the engine and in the language of the first.
    """

    def __init__(self, router: RouterHandle, turn: Turn, request: SpeechRequest, max_chars: int) -> None:
        """``request`` is a stretch without its text; a stretch has at most ``max_chars`` characters."""
        self._router = router
        self._turn = turn
        self._request = request
        self._max_chars = max_chars
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._asked: asyncio.Queue[_Asked | None] = asyncio.Queue()
        self._given = 0
        self._asking = asyncio.create_task(self._ask())

    async def next(self) -> Stretch | None:
        """The next stretch once it has begun to sound, None after the last. Raises ``VoiceCloneError``."""
        if self._given:
            self._room.release()
        asked = await self._asked.get()
        if asked is None:
            await self._asking
            return None
        try:
            started, frames = await asked.task
        except TooManyAtOnce:
            if not self._given:
                raise
            # It was this turn's own other stretch that took the caller's place, and that has ended.
            started, frames = await begin(self._router, asked.request)
        self._given += 1
        return Stretch(asked.request.text, started, frames)

    async def close(self) -> None:
        """Stop what was asked for and not given out."""
        self._asking.cancel()
        await asyncio.wait({self._asking})
        while not self._asked.empty():
            if (asked := self._asked.get_nowait()) is None:
                continue
            asked.task.cancel()
            await asyncio.wait({asked.task})
            if not asked.task.cancelled() and asked.task.exception() is None:
                await asked.task.result()[1].aclose()

    async def _ask(self) -> None:
        """Ask for stretch after stretch as the text comes."""
        request, first = self._request, True
        try:
            while True:
                # Room first: whatever is completed while there is none goes into one stretch.
                await self._room.acquire()
                text = await self._turn.stretch(self._max_chars)
                if not text:
                    return
                request = replace(request, text=text)
                task = asyncio.create_task(begin(self._router, request))
                self._asked.put_nowait(_Asked(request, task))
                if first:
                    first = False
                    try:
                        started, _ = await asyncio.shield(task)
                    except VoiceCloneError:
                        return  # who waits for this stretch is told
                    request = replace(
                        request, model=started.engine, language=started.language, fallback_engines=()
                    )
                if request.seed is not None:
                    request = replace(request, seed=(request.seed + _SEED_STEP) % _SEED_LIMIT)
        finally:
            self._asked.put_nowait(None)

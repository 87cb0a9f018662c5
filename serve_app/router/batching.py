"""Dynamic batching, slot first: reserve a replica, then take what waits, then send it as one batch.

At low load an utterance leaves at once and alone; under load it waits for a slot and leaves together with
everything that waited beside it. No time is ever spent waiting for a batch to fill.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.contract import Samples
from serve_app.errors import EngineFailed, EngineUnavailable, Overloaded, VoiceCloneError, from_engine
from serve_app.protocol import RowAudio, UtteranceCall
from serve_app.router.dispatch import REPLICA_LOST, BatchCall, EngineDispatch

logger = logging.getLogger("ray.serve")

#: Replicas an utterance is sent to before its request fails. The seed makes every try sound the same.
MAX_TRIES = 3


@dataclass(frozen=True, slots=True)
class _End:
    error: VoiceCloneError | None = None


@dataclass(slots=True, eq=False)
class Row:
    """One utterance on its way through the queue: iterate it for its samples, ``leave`` it when done.

    The buffer holds at most the audio of this one utterance, whose length the engine's card bounds: a slow
    reader delays nobody else's row of the same batch.
    """

    call: UtteranceCall
    queue: EngineQueue
    tries: int = 0
    left: bool = False
    _buffer: asyncio.Queue[Samples | _End] = field(default_factory=asyncio.Queue)
    _received: int = 0
    _skip: int = 0

    async def __aiter__(self) -> AsyncIterator[Samples]:
        """Samples as they come; what has come since the last look, in one piece."""
        while not isinstance(item := await self._buffer.get(), _End):
            ready = [item]
            while not self._buffer.empty() and not isinstance(item := self._buffer.get_nowait(), _End):
                ready.append(item)
            yield np.concatenate(ready)
            if isinstance(item, _End):
                break
        if item.error is not None:
            raise item.error

    def leave(self) -> None:
        """Nobody reads this row any more: it is not sent, or its engine is told to stop. Idempotent."""
        if not self.left:
            self.left = True
            self.queue.forget(self)

    def deliver(self, samples: Samples) -> None:
        """Samples from a replica; those an earlier try has delivered already are skipped."""
        fresh = samples[self._skip :]
        self._skip -= len(samples) - len(fresh)
        if len(fresh):
            self._received += len(fresh)
            self._buffer.put_nowait(fresh)

    def end(self, error: VoiceCloneError | None = None) -> None:
        """No more samples; with ``error`` because it failed."""
        self._buffer.put_nowait(_End(error))

    def restart(self) -> None:
        """Another replica speaks the whole utterance again, unheard up to where the last one came."""
        self._skip = self._received


@dataclass(slots=True, eq=False)
class _Batch:
    rows: list[Row]
    task: asyncio.Task[None]
    open: set[int]


class EngineQueue:
    """The utterances of all requests that wait for one engine, and the batches in flight.

    ``max_rows`` is the engine's slots; it may change at any time and holds for the next batch.
    """

    def __init__(self, dispatch: EngineDispatch, *, max_rows: int, max_waiting: int) -> None:
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self._dispatch = dispatch
        self._waiting: deque[Row] = deque()
        self._arrived = asyncio.Event()
        self._batches: set[_Batch] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump: asyncio.Task[None] | None = None

    def submit(self, call: UtteranceCall) -> Row:
        """Queue one utterance. Raises ``Overloaded`` if too many wait already."""
        if len(self._waiting) >= self.max_waiting:
            raise Overloaded("Too many utterances are waiting. Try again in a moment.", retry_after_s=1.0)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        row = Row(call, self)
        self._waiting.append(row)
        self._arrived.set()
        return row

    def forget(self, row: Row) -> None:
        """Stop working on a row that was left."""
        if row in self._waiting:
            self._waiting.remove(row)
            return
        for batch in self._batches:
            if row in batch.rows:
                if all(batch.rows[index].left for index in batch.open):
                    batch.task.cancel()
                elif batch.rows.index(row) in batch.open:
                    self._spawn(self._dispatch.abandon([row.call.call_id]))
                return

    async def close(self) -> None:
        """Stop all work."""
        for task in [*self._tasks, *([self._pump] if self._pump else [])]:
            task.cancel()

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            taken = asyncio.Event()
            self._spawn(self._serve_batch(taken))
            await taken.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_batch(self, taken: asyncio.Event) -> None:
        """Hold one slot from before the rows are chosen until they are spoken."""
        try:
            async with self._dispatch.slot() as send:
                rows = [self._waiting.popleft() for _ in range(min(self.max_rows, len(self._waiting)))]
                taken.set()
                if rows:
                    await self._exchange(send, rows)
        except REPLICA_LOST as error:
            # No replica could be reserved: whoever waits would wait in vain.
            logger.warning("No replica can be reserved: %s", type(error).__name__)
            while self._waiting:
                self._waiting.popleft().end(
                    EngineUnavailable("The engine is not running. Try again later.", retry_after_s=5.0)
                )
        finally:
            taken.set()

    async def _exchange(self, send: BatchCall, rows: list[Row]) -> None:
        """Send a batch and share out what comes back; rows of a lost replica go to the front again."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - only called from a task
        batch = _Batch(rows, task, set(range(len(rows))))
        self._batches.add(batch)
        for row in rows:
            row.tries += 1
        try:
            async with aclosing(send([row.call for row in rows])) as answers:
                async for answer in answers:
                    for audio in answer:
                        self._share(batch, audio)
            self._fail_open(batch, EngineFailed("The engine ended before the speech did. Try again."))
        except REPLICA_LOST as error:
            logger.warning("A replica was lost with %d rows: %s", len(batch.open), type(error).__name__)
            self._try_again(batch)
        except asyncio.CancelledError:
            # Either everyone has left or the router goes down; in both cases nobody may wait for ever.
            self._fail_open(batch, EngineUnavailable("The server is shutting down. Try again."))
            raise
        finally:
            self._batches.discard(batch)

    def _share(self, batch: _Batch, audio: RowAudio) -> None:
        row = batch.rows[audio.row]
        row.deliver(audio.samples)
        if audio.last:
            batch.open.discard(audio.row)
            row.end(None if audio.error is None else from_engine(audio.error))

    def _fail_open(self, batch: _Batch, error: VoiceCloneError) -> None:
        for index in batch.open:
            batch.rows[index].end(error)
        batch.open.clear()

    def _try_again(self, batch: _Batch) -> None:
        for index in sorted(batch.open, reverse=True):
            row = batch.rows[index]
            if row.left:
                continue
            if row.tries >= MAX_TRIES:
                row.end(EngineFailed(f"The engine failed {row.tries} times on this text. Try again later."))
                continue
            row.restart()
            self._waiting.appendleft(row)
        batch.open.clear()
        self._arrived.set()

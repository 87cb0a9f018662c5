"""Dynamic batching, slot first: reserve a place on a replica, then take what is next, then send it.

At low load an utterance leaves at once and alone; under load it waits for a slot. A replica has as many as
its engine can work on and those of the next batch, and makes one batch of what has come when the engine is
free. No time is ever spent waiting for a batch to fill. Which rows are next is ``FairQueue``'s decision,
taken as late as possible: with the slot in hand.

A row whose replica dies, falls silent or fails is spoken again by another replica; what its listeners have
heard already is skipped, and the seed makes the rest continue exactly there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from ulid import ULID

from engines.contract import OutOfMemory, SynthesisFailed
from serve_app.errors import (
    EngineFailed,
    EngineUnavailable,
    Overloaded,
    QueueTimeout,
    VoiceCloneError,
    from_engine,
)
from serve_app.metrics import QUEUE_WAIT, REAL_TIME_FACTOR, RETRIES, WAITING, Metrics
from serve_app.protocol import BatchTerms, RowAudio, UtteranceCall
from serve_app.router.detached import start_detached
from serve_app.router.dispatch import REPLICA_LOST, Declined, EngineDispatch, Slot
from serve_app.router.fair_queue import FairQueue, Tier
from serve_app.router.rows import Row

logger = logging.getLogger("ray.serve")

#: Replicas an utterance is sent to before its request fails. The seed makes every try sound the same.
MAX_TRIES = 3
#: Slots waited for at once: more makes Serve add replicas sooner, each costs Serve some probing.
_MAX_RESERVING = 8
#: A slot that takes longer may come from a replica that will never answer: ask for another beside it.
_HEDGE_AFTER_S = 2.0
#: Wait before looking again for a replica other than the one that failed.
_ELSEWHERE_INTERVAL_S = 0.2
#: Rows whose end times give the rate that `Retry-After` is computed from.
_RATE_ROWS = 32
_RETRY_AFTER_S = (1.0, 60.0)


@dataclass(slots=True)
class QueueLimits:
    """What bounds a queue and its batches. May change at any time and holds for the next decision."""

    #: Utterances sent to a replica at once.
    rows_per_call: int
    #: Utterances of one batch, which a replica makes of one or several calls.
    max_rows: int
    #: Characters of one batch; None is unbounded. A single row always fits.
    max_chars: int | None
    #: First utterances that may wait; an interactive request does not count what is bulk.
    max_waiting: int
    #: Longest wait of a first utterance, and of one that has to be spoken again.
    max_wait_s: float
    max_redo_wait_s: float
    #: Longest silence of a replica that works on rows.
    chunk_timeout_s: float


@dataclass(slots=True, eq=False)
class _Call:
    rows: list[Row]
    ids: list[str]
    slot: Slot
    task: asyncio.Task[None]
    sent_at_s: float
    open: set[int]


class EngineQueue:
    """The utterances of all requests that wait for one engine, and the calls in flight."""

    def __init__(
        self, name: str, dispatch: EngineDispatch, limits: QueueLimits, metrics: Metrics, sample_rate_hz: int
    ) -> None:
        self.limits = limits
        self._name = name
        self._sample_rate_hz = sample_rate_hz
        self._dispatch = dispatch
        self._metrics = metrics
        self._queue: FairQueue[Row] = FairQueue()
        self._queued_at_s: dict[Row, float] = {}
        self._deadlines: dict[Row, asyncio.TimerHandle] = {}
        self._failures: dict[Row, VoiceCloneError] = {}
        self._sent: dict[Row, tuple[_Call, int]] = {}
        self._reserving: dict[asyncio.Task[None], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended_at_s: deque[float] = deque(maxlen=_RATE_ROWS)
        self._looking_elsewhere = False
        self._hedge: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Utterances not sent yet."""
        return len(self._queue)

    @property
    def speaking(self) -> int:
        """Utterances on a replica now."""
        return len(self._sent)

    def submit(
        self,
        call: UtteranceCall,
        *,
        client: str = "",
        weight: float = 1.0,
        tier: Tier = Tier.FIRST,
        group: tuple[object, ...] = (),
    ) -> Row:
        """Queue one utterance. Raises ``Overloaded`` if it is a first one and too many wait already.

        Later utterances are always taken: their request was accepted, and its look-ahead bounds them.
        """
        if tier in (Tier.FIRST, Tier.BULK_FIRST):
            firsts = (Tier.FIRST,) if tier is Tier.FIRST else (Tier.FIRST, Tier.BULK_FIRST)
            if self._queue.waiting(*firsts) >= self.limits.max_waiting:
                raise Overloaded(
                    "Too many requests wait for this engine. Try again in a moment.",
                    retry_after_s=self.retry_after_s(),
                )
        row = Row(call, client, weight, tier, group)
        row.when_done(lambda: self._forget(row))
        self._put(row)
        self._top_up()
        return row

    def promote(self, row: Row, tier: Tier) -> None:
        """Move a waiting row to ``tier`` if that is sooner."""
        if tier < row.tier and self._queue.remove(row):
            row.tier = tier
            self._queue.put(row)

    def retry_after_s(self) -> float:
        """When a refused request may find room: the time the rows that wait now will take."""
        least_s, most_s = _RETRY_AFTER_S
        if len(self._ended_at_s) < 2:
            return least_s
        span_s = self._ended_at_s[-1] - self._ended_at_s[0]
        per_row_s = span_s / (len(self._ended_at_s) - 1)
        return min(max(per_row_s * len(self._queue), least_s), most_s)

    def _no_engine_free(self, waited_s: float) -> QueueTimeout:
        return QueueTimeout(
            f"No engine was free within {waited_s:g} s. Try again later.", retry_after_s=self.retry_after_s()
        )

    def end_all(self, error: VoiceCloneError) -> None:
        """End every row that waits."""
        for row in list(self._queue):
            self._drop(row, error)

    def _put(self, row: Row) -> None:
        limits = self.limits
        now_s = time.monotonic()
        self._queued_at_s[row] = now_s
        if row.tier is Tier.REDO:
            self._set_deadline(row, limits.max_redo_wait_s)
        elif row.tier in (Tier.FIRST, Tier.BULK_FIRST):
            self._set_deadline(row, limits.max_wait_s)
        self._queue.put(row)
        self._metrics.level(WAITING, len(self._queue), engine=self._name)

    def _set_deadline(self, row: Row, wait_s: float) -> None:
        error = self._failures.get(row) or self._no_engine_free(wait_s)
        self._deadlines[row] = asyncio.get_running_loop().call_later(wait_s, self._drop, row, error)

    def _unqueued(self, row: Row) -> None:
        """Forget what was kept about a row while it waited."""
        self._queued_at_s.pop(row, None)
        self._failures.pop(row, None)
        if (deadline := self._deadlines.pop(row, None)) is not None:
            deadline.cancel()
        self._metrics.level(WAITING, len(self._queue), engine=self._name)

    def _drop(self, row: Row, error: VoiceCloneError) -> None:
        if self._queue.remove(row):
            self._unqueued(row)
            row.end(error)

    def _forget(self, row: Row) -> None:
        """Stop working on a row that everyone has left; nothing to do for one that has ended."""
        if self._queue.remove(row):
            self._unqueued(row)
            return
        if row not in self._sent:
            return
        sent, index = self._sent[row]
        if all(sent.rows[other].left for other in sent.open):
            sent.task.cancel()
        else:
            self._spawn(self._abandon(sent.ids[index]))

    async def _abandon(self, call_id: str) -> None:
        try:
            await self._dispatch.abandon([call_id])
        except REPLICA_LOST as error:
            # One of the replicas is gone; if it was the row's, so is the row.
            logger.info("Not every replica heard of an abandoned row: %s", type(error).__name__)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = start_detached(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _top_up(self) -> None:
        """Have as many slots asked for as the waiting rows can fill."""
        waiting = len(self._queue)
        if self._looking_elsewhere:
            # The free slot is on the replica these rows must not go back to: it would be taken in vain.
            waiting = sum(row.avoid is None for row in self._queue)
        if not waiting:
            return
        now_s = time.monotonic()
        overdue = sum(since_s < now_s - _HEDGE_AFTER_S for since_s in self._reserving.values())
        wanted = min(ceil(waiting / self.limits.rows_per_call) + overdue, _MAX_RESERVING)
        while len(self._reserving) < wanted:
            task = self._spawn(self._use_slot())
            self._reserving[task] = now_s
        if self._hedge is None:
            self._hedge = asyncio.get_running_loop().call_later(_HEDGE_AFTER_S, self._look_again)

    def _look_again(self) -> None:
        self._hedge = None
        self._top_up()

    async def _use_slot(self) -> None:
        """Hold one slot from before the rows are chosen until they are spoken."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - only called from a task
        try:
            async with self._dispatch.slot() as slot:
                self._reserving.pop(task, None)
                rows = self._take(slot.replica)
                self._top_up()
                if rows:
                    await self._exchange(slot, rows, task)
                elif self._queue:
                    self._look_elsewhere()
        except REPLICA_LOST as error:
            if task not in self._reserving:
                # The slot was given back to a replica that is no more; its rows are seen to already.
                return
            logger.warning("No replica can be reserved: %s", type(error).__name__)
            self.end_all(EngineUnavailable("The engine is not running. Try again later.", retry_after_s=5.0))
        finally:
            self._reserving.pop(task, None)
            self._top_up()

    def _take(self, replica: str | None) -> list[Row]:
        """The rows of the next call: the fairest one, then those that go with it.

        Nothing that must not go to ``replica``; if that is None, it is not known where the rows will go.
        """
        first = self._queue.take(lambda row: row.avoid is None or row.avoid != replica)
        if first is None:
            return []
        rows = [first]
        limits = self.limits

        def joins(row: Row) -> bool:
            if row.avoid != first.avoid or row.alone or row.group != first.group:
                return False
            return limits.max_chars is None or sum(r.cost for r in rows) + row.cost <= limits.max_chars

        while len(rows) < min(limits.rows_per_call, limits.max_rows) and not first.alone:
            row = self._queue.take(joins)
            if row is None:
                break
            rows.append(row)
        now_s = time.monotonic()
        for row in rows:
            waited_s = now_s - self._queued_at_s[row]
            self._metrics.observe(QUEUE_WAIT, waited_s, engine=self._name, tier=row.tier.name.lower())
            self._unqueued(row)
        return rows

    def _look_elsewhere(self) -> None:
        if not self._looking_elsewhere:
            self._looking_elsewhere = True
            self._spawn(self._find_elsewhere())

    async def _find_elsewhere(self) -> None:
        """Only rows wait that must not go back to the free replica: is there another one?"""
        try:
            replicas = await self._dispatch.replicas()
            for row in list(self._queue):
                if row.avoid is not None and replicas == frozenset((row.avoid,)):
                    self._drop(row, self._failures.get(row) or _failed(row))
            await asyncio.sleep(_ELSEWHERE_INTERVAL_S)
        finally:
            self._looking_elsewhere = False
            self._top_up()

    async def _exchange(self, slot: Slot, rows: list[Row], task: asyncio.Task[None]) -> None:
        """Send rows and share out what comes back."""
        ids = [str(ULID()) for _ in rows]
        sent = _Call(rows, ids, slot, task, time.monotonic(), set(range(len(rows))))
        limits = self.limits
        terms = BatchTerms(rows[0].group, 1 if rows[0].alone else limits.max_rows, limits.max_chars)
        for index, row in enumerate(rows):
            row.tries += 1
            self._sent[row] = (sent, index)
        try:
            calls = [replace(row.call, call_id=call_id) for row, call_id in zip(rows, ids, strict=True)]
            async with aclosing(slot.send(calls, terms, rows[0].avoid)) as answers:
                while (answer := await self._next(slot, answers)) is not None:
                    for audio in answer:
                        self._share(sent, audio)
            early = EngineFailed("The engine ended before the speech did. Try again.")
            self._redo_open(sent, "ended", early)
        except Declined:
            for index in sorted(sent.open):
                row = self._close(sent, index)
                row.tries -= 1
                self._put(row)
            self._look_elsewhere()
        except TimeoutError:
            if slot.replica is None:
                for index in sorted(sent.open):
                    self._close(sent, index).end(self._no_engine_free(limits.max_wait_s))
            else:
                logger.warning("Replica %s was silent for %g s.", slot.replica, limits.chunk_timeout_s)
                self._redo_open(sent, "silent")
        except REPLICA_LOST as error:
            logger.warning("A replica was lost with %d rows: %s", len(sent.open), type(error).__name__)
            self._redo_open(sent, "lost")
        finally:
            # Cancelled: everyone has left, or the router goes down; nobody may wait for ever.
            for index in sorted(sent.open):
                self._close(sent, index).end(
                    EngineUnavailable("The server is shutting down. Try again.", retry_after_s=1.0)
                )

    async def _next(self, slot: Slot, answers: AsyncGenerator[list[RowAudio], None]) -> list[RowAudio] | None:
        """The next answer, None at the end.

        Raises ``TimeoutError`` if the replica is silent for too long, or if none takes the rows in time.
        """
        limits = self.limits
        async with asyncio.timeout(limits.max_wait_s if slot.replica is None else limits.chunk_timeout_s):
            return await anext(answers, None)

    def _close(self, sent: _Call, index: int) -> Row:
        sent.open.discard(index)
        row = sent.rows[index]
        del self._sent[row]
        return row

    def _share(self, sent: _Call, audio: RowAudio) -> None:
        if audio.row not in sent.open:
            return
        row = sent.rows[audio.row]
        row.deliver(audio.samples)
        if not audio.last:
            return
        self._close(sent, audio.row)
        if audio.error is None:
            self._measure(sent, row)
            row.end()
        elif isinstance(audio.error, (SynthesisFailed, OutOfMemory)):
            row.alone = isinstance(audio.error, OutOfMemory)
            # A replica that is out of memory for a batch may have enough for the row alone.
            failed_on = None if row.alone else sent.slot.replica
            self._redo(row, failed_on, "failed", from_engine(audio.error))
        else:
            row.end(from_engine(audio.error))

    def _measure(self, sent: _Call, row: Row) -> None:
        now_s = time.monotonic()
        self._ended_at_s.append(now_s)
        audio_s = row.received / self._sample_rate_hz
        if audio_s:
            self._metrics.observe(REAL_TIME_FACTOR, (now_s - sent.sent_at_s) / audio_s, engine=self._name)

    def _redo_open(self, sent: _Call, reason: str, error: VoiceCloneError | None = None) -> None:
        for index in sorted(sent.open):
            row = self._close(sent, index)
            self._redo(row, sent.slot.replica, reason, error or _failed(row))

    def _redo(self, row: Row, failed_on: str | None, reason: str, error: VoiceCloneError) -> None:
        """Let a replica other than ``failed_on`` speak ``row`` again; without one it ends with ``error``."""
        if row.left:
            return
        if row.tries >= MAX_TRIES:
            row.end(error)
            return
        self._metrics.count(RETRIES, engine=self._name, reason=reason)
        row.restart(failed_on)
        row.tier = Tier.REDO
        self._failures[row] = error
        self._put(row)
        self._top_up()


def _failed(row: Row) -> VoiceCloneError:
    return EngineFailed(
        f"The engine failed {row.tries} time{'s' * (row.tries != 1)} on this text. Try again later."
    )

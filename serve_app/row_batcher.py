"""Rows wait inside a replica until its engine is free; then as many as go together are one batch.

Calls that came apart leave together: a batch closes when the engine begins it, not when the router sent it.
Pure asyncio, without Serve.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from engines.contract import Utterance
from serve_app.protocol import BatchTerms, RowAudio

Speak = Callable[[list[Utterance]], AsyncGenerator[list[RowAudio], None]]


class _Outbox:
    """Where the audio of one call's rows is collected.

    It holds at most one utterance a row, which the engine's card bounds.
    """

    def __init__(self, rows: int) -> None:
        self.answers: asyncio.Queue[list[RowAudio]] = asyncio.Queue()
        #: Rows that may still get audio, and those of them that no batch has taken yet.
        self.open = self.waiting = rows


@dataclass(slots=True, eq=False)
class _WaitingRow:
    utterance: Utterance
    terms: BatchTerms
    outbox: _Outbox
    #: Its number in the call it came with.
    index: int
    #: True after its last audio, or after it was given up.
    closed: bool = False

    def close(self) -> None:
        """No more audio; wakes the call if it was its last row."""
        if not self.closed:
            self.closed = True
            self.outbox.open -= 1
            if not self.outbox.open:
                self.outbox.answers.put_nowait([])


class RowBatcher:
    """Makes batches of the rows that wait whenever the engine has a free turn."""

    def __init__(self, speak: Speak, concurrent_batches: int) -> None:
        """``speak`` runs one batch; it is called for at most ``concurrent_batches`` at the same time."""
        self._speak = speak
        self._most = concurrent_batches
        #: The engine's turns. Whoever holds one may run one batch.
        self.turns = asyncio.Semaphore(concurrent_batches)
        self._waiting: deque[_WaitingRow] = deque()
        self._running = self._speaking = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def rows(self) -> int:
        """Rows that wait, and rows of batches the engine has not let go."""
        return len(self._waiting) + self._speaking

    async def answers(
        self, utterances: list[Utterance], terms: BatchTerms, beat_s: float
    ) -> AsyncGenerator[list[RowAudio], None]:
        """Audio of ``utterances``; an empty answer every ``beat_s`` as long as some of them only wait.

        Ends when every row has had its last audio or was given up by the engine. Closing it abandons them.
        """
        outbox = _Outbox(len(utterances))
        rows = [_WaitingRow(utterance, terms, outbox, index) for index, utterance in enumerate(utterances)]
        self._waiting.extend(rows)
        for _ in range(min(self._most - self._running, len(self._waiting))):
            self._running += 1
            task = asyncio.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            while outbox.open or not outbox.answers.empty():
                try:
                    async with asyncio.timeout(beat_s):
                        answer = await outbox.answers.get()
                except TimeoutError:
                    if outbox.waiting:
                        yield []
                    continue
                if answer:
                    yield answer
        finally:
            for row in rows:
                row.utterance.abandoned.set()

    async def _run(self) -> None:
        """Run batches until nothing waits."""
        try:
            while self._waiting:
                async with self.turns:
                    if batch := self._take():
                        await self._exchange(batch)
        finally:
            self._running -= 1

    def _take(self) -> list[_WaitingRow]:
        """The row that came first and those that go with it; rows nobody waits for are dropped."""
        batch: list[_WaitingRow] = []
        left: deque[_WaitingRow] = deque()
        for row in self._waiting:
            if row.utterance.abandoned.is_set():
                row.outbox.waiting -= 1
                row.close()
            elif not batch or _fits(batch, row):
                row.outbox.waiting -= 1
                batch.append(row)
            else:
                left.append(row)
        self._waiting = left
        return batch

    async def _exchange(self, batch: list[_WaitingRow]) -> None:
        """Have a batch spoken and put what comes into the outboxes of its calls."""
        self._speaking += len(batch)
        try:
            async with aclosing(self._speak([row.utterance for row in batch])) as answers:
                async for answer in answers:
                    shares: dict[_Outbox, list[RowAudio]] = {}
                    for audio in answer:
                        row = batch[audio.row]
                        shares.setdefault(row.outbox, []).append(replace(audio, row=row.index))
                    for outbox, share in shares.items():
                        outbox.answers.put_nowait(share)
                    for audio in answer:
                        if audio.last:
                            batch[audio.row].close()
                    if all(row.utterance.abandoned.is_set() for row in batch):
                        return
        finally:
            self._speaking -= len(batch)
            for row in batch:
                row.close()


def _fits(batch: list[_WaitingRow], row: _WaitingRow) -> bool:
    """True if ``row`` may join ``batch``."""
    terms = batch[0].terms
    if row.terms != terms or len(batch) >= terms.max_rows:
        return False
    characters = sum(len(other.utterance.text) for other in [*batch, row])
    return terms.max_chars is None or characters <= terms.max_chars

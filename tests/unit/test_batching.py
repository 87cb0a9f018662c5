"""The queue of one engine, against a stand-in for Serve: batches, sharing out, leaving, lost replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from engines.contract import Conditioning, Samples, SynthesisFailed
from serve_app.errors import EngineFailed, EngineUnavailable, Overloaded
from serve_app.protocol import RowAudio, UtteranceCall
from serve_app.router.batching import EngineQueue, Row
from serve_app.router.dispatch import BatchCall, EngineDispatch

VOICE = Conditioning("fake", "1", {})
CHUNKS = 5


class ReplicaLost(ConnectionError):
    """What a dead replica raises here."""


class FakeDispatch(EngineDispatch):
    """One replica with one slot. Each row gets ``CHUNKS`` chunks that hold the first letter of its text."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(1)
        self.batches: list[list[str]] = []
        self.abandoned: list[str] = []
        self.stopped = 0
        self.steps = 0
        self.before_step: Callable[[int], None] = lambda _: None
        self.no_replica = False

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[BatchCall]:
        """The only slot."""
        if self.no_replica:
            raise ReplicaLost
        async with self.slots:
            yield self._send

    async def _send(self, batch: list[UtteranceCall]) -> AsyncGenerator[list[RowAudio], None]:
        self.batches.append([call.text for call in batch])
        try:
            for step in range(CHUNKS):
                await asyncio.sleep(0)
                self.steps += 1
                self.before_step(step)
                live = [row for row, call in enumerate(batch) if call.call_id not in self.abandoned]
                yield [self._chunk(row, batch[row], step) for row in live]
        except (GeneratorExit, asyncio.CancelledError):
            self.stopped += 1
            raise

    def _chunk(self, row: int, call: UtteranceCall, step: int) -> RowAudio:
        if call.text == "bad":
            return RowAudio(row, np.zeros(0, np.float32), True, SynthesisFailed("It failed."))
        samples = np.full(10, ord(call.text[0]) + step / 10, np.float32)
        return RowAudio(row, samples, step == CHUNKS - 1)

    async def abandon(self, call_ids: list[str]) -> None:
        """Remember who was abandoned."""
        self.abandoned += call_ids


@pytest.fixture(autouse=True)
def lost_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the queue take our error for Ray's."""
    monkeypatch.setattr("serve_app.router.batching.REPLICA_LOST", (ReplicaLost,))


@pytest.fixture
async def fake() -> FakeDispatch:
    """The stand-in."""
    return FakeDispatch()


@pytest.fixture
async def queue(fake: FakeDispatch) -> AsyncIterator[EngineQueue]:
    """A queue over the stand-in with three rows to a batch."""
    queue = EngineQueue(fake, max_rows=3, max_waiting=10)
    yield queue
    await queue.close()


def submit(queue: EngineQueue, text: str) -> Row:
    """Queue an utterance whose id is its text."""
    return queue.submit(UtteranceCall(text, text, "en", VOICE, seed=1))


async def samples(row: Row) -> Samples:
    """All of a row."""
    return np.concatenate([part async for part in row])


def whole(text: str) -> Samples:
    """What a row of ``text`` sounds like."""
    return np.concatenate([np.full(10, ord(text[0]) + step / 10, np.float32) for step in range(CHUNKS)])


async def test_a_lone_row_leaves_at_once(queue: EngineQueue, fake: FakeDispatch) -> None:
    np.testing.assert_array_equal(await samples(submit(queue, "a")), whole("a"))
    assert fake.batches == [["a"]]


async def test_what_waits_while_the_engine_is_busy_leaves_together(
    queue: EngineQueue, fake: FakeDispatch
) -> None:
    first = submit(queue, "a")
    await anext(aiter(first))
    rows = [submit(queue, text) for text in "bcde"]
    for row, text in zip(rows, "bcde", strict=True):
        np.testing.assert_array_equal(await samples(row), whole(text))
    assert fake.batches == [["a"], ["b", "c", "d"], ["e"]]


async def test_batch_size_changes_live(queue: EngineQueue, fake: FakeDispatch) -> None:
    queue.max_rows = 1
    rows = [submit(queue, text) for text in "ab"]
    for row in rows:
        await samples(row)
    assert fake.batches == [["a"], ["b"]]


async def test_one_failing_row_fails_alone(queue: EngineQueue) -> None:
    bad, good = submit(queue, "bad"), submit(queue, "good")
    with pytest.raises(EngineFailed):
        await samples(bad)
    np.testing.assert_array_equal(await samples(good), whole("good"))


async def test_row_that_leaves_while_it_waits_is_never_sent(queue: EngineQueue, fake: FakeDispatch) -> None:
    async with fake.slots:
        gone, stays = submit(queue, "x"), submit(queue, "s")
        await asyncio.sleep(0)
        gone.leave()
        gone.leave()
    await samples(stays)
    assert fake.batches == [["s"]]


async def test_last_row_to_leave_stops_the_batch(queue: EngineQueue, fake: FakeDispatch) -> None:
    one, two = submit(queue, "a"), submit(queue, "b")
    await anext(aiter(one))
    one.leave()
    await asyncio.sleep(0)
    assert fake.stopped == 0
    two.leave()
    for _ in range(5):
        await asyncio.sleep(0)
    assert fake.stopped == 1
    assert fake.steps < CHUNKS
    np.testing.assert_array_equal(await samples(submit(queue, "c")), whole("c"))


async def test_row_that_leaves_a_shared_batch_is_abandoned(queue: EngineQueue, fake: FakeDispatch) -> None:
    gone, stays = submit(queue, "gone"), submit(queue, "stays")
    await anext(aiter(gone))
    gone.leave()
    np.testing.assert_array_equal(await samples(stays), whole("stays"))
    assert fake.abandoned == ["gone"]


@pytest.mark.parametrize("step", range(CHUNKS))
async def test_lost_replica_is_not_heard(queue: EngineQueue, fake: FakeDispatch, step: int) -> None:
    died = False

    def die_once(now: int) -> None:
        nonlocal died
        if now == step and not died:
            died = True
            raise ReplicaLost

    fake.before_step = die_once
    rows = [submit(queue, text) for text in "ab"]
    for row, text in zip(rows, "ab", strict=True):
        np.testing.assert_array_equal(await samples(row), whole(text))
    assert fake.batches == [["a", "b"], ["a", "b"]]


async def test_tries_are_bounded(queue: EngineQueue, fake: FakeDispatch) -> None:
    def die(_: int) -> None:
        raise ReplicaLost

    fake.before_step = die
    with pytest.raises(EngineFailed, match="3 times"):
        await samples(submit(queue, "a"))
    assert len(fake.batches) == 3


async def test_no_replica_at_all_is_said(queue: EngineQueue, fake: FakeDispatch) -> None:
    fake.no_replica = True
    with pytest.raises(EngineUnavailable):
        await samples(submit(queue, "a"))


async def test_queue_is_bounded(queue: EngineQueue, fake: FakeDispatch) -> None:
    async with fake.slots:
        rows = [submit(queue, str(number)) for number in range(10)]
        with pytest.raises(Overloaded) as caught:
            submit(queue, "one too many")
        assert caught.value.retry_after_s
    for row in rows:
        await samples(row)


async def test_closing_leaves_nobody_waiting(queue: EngineQueue, fake: FakeDispatch) -> None:
    row = submit(queue, "a")
    await anext(aiter(row))
    await queue.close()
    with pytest.raises(EngineUnavailable):
        await samples(row)

"""The queue of one engine, against a stand-in for Serve: batches, sharing out, leaving, lost replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

from engines.contract import Conditioning, OutOfMemory, Samples, SynthesisFailed
from serve_app.errors import EngineFailed, EngineUnavailable, Overloaded, QueueTimeout
from serve_app.metrics import Metrics
from serve_app.protocol import BatchTerms, RowAudio, UtteranceCall
from serve_app.router.batching import EngineQueue, QueueLimits
from serve_app.router.dispatch import Declined, EngineDispatch, Slot
from serve_app.router.fair_queue import Tier
from serve_app.router.rows import Listener, Row

VOICE = Conditioning("fake", "1", {})
CHUNKS = 5


class ReplicaLost(ConnectionError):
    """What a dead replica raises here."""


class FakeDispatch(EngineDispatch):
    """Replicas "r0", "r1", … with one slot each. Each row gets ``CHUNKS`` chunks of its first letter."""

    def __init__(self, replicas: int = 1) -> None:
        self.free: asyncio.Queue[str] = asyncio.Queue()
        for number in range(replicas):
            self.free.put_nowait(f"r{number}")
        self.running = frozenset(f"r{number}" for number in range(replicas))
        self.batches: list[list[str]] = []
        self.used: list[str] = []
        self.ids: dict[str, str] = {}
        self.abandoned: list[str] = []
        self.stopped = 0
        self.steps = 0
        self.before_step: Callable[[str, int], None] = lambda replica, step: None
        self.silent_replica = ""
        self.no_replica = False

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """The next free replica."""
        if self.no_replica:
            raise ReplicaLost
        replica = await self.free.get()
        try:
            yield Slot(lambda batch, terms, avoid: self._send(replica, batch), replica)
        finally:
            self.free.put_nowait(replica)

    async def _send(self, replica: str, batch: list[UtteranceCall]) -> AsyncGenerator[list[RowAudio], None]:
        self.batches.append([call.text for call in batch])
        self.used.append(replica)
        self.ids.update({call.call_id: call.text for call in batch})
        try:
            for step in range(CHUNKS):
                await asyncio.sleep(0)
                if replica == self.silent_replica:
                    await asyncio.sleep(3600)
                self.steps += 1
                self.before_step(replica, step)
                live = [row for row, call in enumerate(batch) if call.text not in self.abandoned]
                yield [self._chunk(replica, row, batch[row], step) for row in live]
        except (GeneratorExit, asyncio.CancelledError):
            self.stopped += 1
            raise

    def _chunk(self, replica: str, row: int, call: UtteranceCall, step: int) -> RowAudio:
        if call.text == "bad" or (call.text == "bad on r0" and replica == "r0"):
            return RowAudio(row, np.zeros(0, np.float32), True, SynthesisFailed("It failed."))
        if call.text == "big" and len(self.batches[-1]) > 1:
            return RowAudio(row, np.zeros(0, np.float32), True, OutOfMemory("Too much."))
        samples = np.full(10, ord(call.text[0]) + step / 10, np.float32)
        return RowAudio(row, samples, step == CHUNKS - 1)

    async def replicas(self) -> frozenset[str] | None:
        """All that run."""
        return self.running

    async def abandon(self, call_ids: list[str]) -> None:
        """Remember whose row was abandoned."""
        self.abandoned += [self.ids[call_id] for call_id in call_ids]


class UnreservedFake(FakeDispatch):
    """Rows go to the replicas in turn; a replica is known only once it has taken them."""

    accepts = True

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """A place on nobody knows which replica."""

        async def send(
            batch: list[UtteranceCall], terms: BatchTerms, avoid: str | None
        ) -> AsyncGenerator[list[RowAudio], None]:
            if not self.accepts:
                await asyncio.sleep(3600)
            replica = await self.free.get()
            self.free.put_nowait(replica)
            if replica == avoid:
                self.used.append(f"{replica} declined")
                raise Declined
            slot.replica = replica
            async for answer in self._send(replica, batch):
                yield answer

        slot = Slot(send)
        yield slot


@pytest.fixture(autouse=True)
def lost_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the queue take our error for Ray's, and not wait long for another replica."""
    monkeypatch.setattr("serve_app.router.batching.REPLICA_LOST", (ReplicaLost,))
    monkeypatch.setattr("serve_app.router.batching._ELSEWHERE_INTERVAL_S", 0.0)


def limits(max_rows: int = 3, **changes: float) -> QueueLimits:
    """Limits of a queue under test."""
    values: dict[str, Any] = {
        "max_chars": None,
        "max_waiting": 10,
        "max_wait_s": 60.0,
        "max_redo_wait_s": 60.0,
        "chunk_timeout_s": 60.0,
    }
    return QueueLimits(rows_per_call=max_rows, max_rows=max_rows, **{**values, **changes})


def queue_over(fake: FakeDispatch, **changes: Any) -> EngineQueue:
    """A queue that sends to ``fake``."""
    return EngineQueue("fake", fake, limits(**changes), Metrics(), 24_000)


@pytest.fixture
async def fake() -> FakeDispatch:
    """A stand-in with one replica."""
    return FakeDispatch()


@pytest.fixture
async def queue(fake: FakeDispatch) -> EngineQueue:
    """A queue over the stand-in with three rows to a batch."""
    return queue_over(fake)


def row_of(queue: EngineQueue, text: str, **about: Any) -> Row:
    """Queue an utterance."""
    return queue.submit(UtteranceCall("", text, "en", VOICE, seed=1), **about)


def submit(queue: EngineQueue, text: str, **about: Any) -> Listener:
    """Queue an utterance and listen to it."""
    return row_of(queue, text, **about).join()


async def samples(listener: Listener) -> Samples:
    """All of a recording."""
    return np.concatenate([part async for part in listener])


def whole(text: str) -> Samples:
    """What a row of ``text`` sounds like."""
    return np.concatenate([np.full(10, ord(text[0]) + step / 10, np.float32) for step in range(CHUNKS)])


async def first_part(listener: Listener) -> None:
    """Listen until the first samples are there."""
    await anext(aiter(listener))


async def settle() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_lone_row_leaves_at_once(queue: EngineQueue, fake: FakeDispatch) -> None:
    np.testing.assert_array_equal(await samples(submit(queue, "a")), whole("a"))
    assert fake.batches == [["a"]]


async def test_what_waits_while_the_engine_is_busy_leaves_together(
    queue: EngineQueue, fake: FakeDispatch
) -> None:
    await first_part(submit(queue, "a"))
    rows = [submit(queue, text) for text in "bcde"]
    for row, text in zip(rows, "bcde", strict=True):
        np.testing.assert_array_equal(await samples(row), whole(text))
    assert fake.batches == [["a"], ["b", "c", "d"], ["e"]]


async def test_limits_change_live(queue: EngineQueue, fake: FakeDispatch) -> None:
    queue.limits = limits(max_rows=1)
    for row in [submit(queue, text) for text in "ab"]:
        await samples(row)
    assert fake.batches == [["a"], ["b"]]


async def test_batches_are_bounded_in_characters(queue: EngineQueue, fake: FakeDispatch) -> None:
    queue.limits = limits(max_rows=9, max_chars=5)
    for row in [submit(queue, text) for text in ("aaa", "bbb", "cc", "dddddddd")]:
        await samples(row)
    assert fake.batches == [["aaa", "cc"], ["bbb"], ["dddddddd"]]


async def test_a_batch_holds_only_what_the_engine_can_mix(queue: EngineQueue, fake: FakeDispatch) -> None:
    rows = [submit(queue, text, group=(group,)) for text, group in (("a", 1), ("b", 2), ("c", 1))]
    for row in rows:
        await samples(row)
    assert fake.batches == [["a", "c"], ["b"]]


async def test_idle_replicas_work_side_by_side() -> None:
    fake = FakeDispatch(replicas=3)
    queue = queue_over(fake, max_rows=1)
    await asyncio.gather(*(samples(submit(queue, text)) for text in "abc"))
    assert sorted(fake.used) == ["r0", "r1", "r2"]


async def test_one_failing_row_fails_alone(queue: EngineQueue) -> None:
    bad, good = submit(queue, "bad"), submit(queue, "good")
    with pytest.raises(EngineFailed, match="It failed"):
        await samples(bad)
    np.testing.assert_array_equal(await samples(good), whole("good"))


async def test_row_that_leaves_while_it_waits_is_never_sent(queue: EngineQueue, fake: FakeDispatch) -> None:
    replica = await fake.free.get()
    gone, stays = submit(queue, "x"), submit(queue, "s")
    await settle()
    gone.leave()
    gone.leave()
    fake.free.put_nowait(replica)
    await samples(stays)
    assert fake.batches == [["s"]]


async def test_last_row_to_leave_stops_the_batch(queue: EngineQueue, fake: FakeDispatch) -> None:
    one, two = submit(queue, "a"), submit(queue, "b")
    await first_part(one)
    one.leave()
    await asyncio.sleep(0)
    assert fake.stopped == 0
    two.leave()
    await settle()
    assert fake.stopped == 1
    assert fake.steps < CHUNKS
    assert (queue.waiting, queue.speaking) == (0, 0)
    np.testing.assert_array_equal(await samples(submit(queue, "c")), whole("c"))


async def test_row_that_leaves_a_shared_batch_is_abandoned(queue: EngineQueue, fake: FakeDispatch) -> None:
    gone, stays = submit(queue, "gone"), submit(queue, "stays")
    await first_part(gone)
    gone.leave()
    np.testing.assert_array_equal(await samples(stays), whole("stays"))
    assert fake.abandoned == ["gone"]


@pytest.mark.parametrize("step", range(CHUNKS))
async def test_lost_replica_is_not_heard(step: int) -> None:
    fake = FakeDispatch(replicas=2)
    queue = queue_over(fake)

    def die(replica: str, now: int) -> None:
        if now == step and replica == "r0":
            raise ReplicaLost

    fake.before_step = die
    rows = [submit(queue, text) for text in "ab"]
    for row, text in zip(rows, "ab", strict=True):
        np.testing.assert_array_equal(await samples(row), whole(text))
    assert fake.batches == [["a", "b"], ["a", "b"]]
    assert fake.used == ["r0", "r1"]


async def test_silent_replica_is_given_up() -> None:
    fake = FakeDispatch(replicas=2)
    fake.silent_replica = "r0"
    queue = queue_over(fake, chunk_timeout_s=0.05)
    np.testing.assert_array_equal(await samples(submit(queue, "a")), whole("a"))
    assert fake.used == ["r0", "r1"]
    assert fake.stopped == 1


async def test_failed_row_is_spoken_elsewhere() -> None:
    fake = FakeDispatch(replicas=2)
    queue = queue_over(fake)
    np.testing.assert_array_equal(await samples(submit(queue, "bad on r0")), whole("b"))
    assert fake.used == ["r0", "r1"]


async def test_replica_that_declines_has_not_tried() -> None:
    fake = UnreservedFake(replicas=2)
    queue = queue_over(fake)
    # Every second call comes to the replica that failed, which declines it.
    fake.free = asyncio.Queue()
    for replica in ("r0", "r0", "r0", "r0", "r1"):
        fake.free.put_nowait(replica)
    row = row_of(queue, "bad on r0")
    np.testing.assert_array_equal(await samples(row.join()), whole("bad on r0"))
    assert fake.used == ["r0", "r0 declined", "r0 declined", "r0 declined", "r1"]
    assert row.tries == 2


async def test_row_that_no_replica_takes_waits_only_so_long() -> None:
    fake = UnreservedFake()
    fake.accepts = False
    queue = queue_over(fake, max_wait_s=0.05, chunk_timeout_s=0.01)
    with pytest.raises(QueueTimeout):
        await samples(submit(queue, "a"))
    assert (queue.waiting, queue.speaking) == (0, 0)


async def test_row_that_was_too_much_is_spoken_alone(queue: EngineQueue, fake: FakeDispatch) -> None:
    big, small = submit(queue, "big"), submit(queue, "small")
    np.testing.assert_array_equal(await samples(big), whole("b"))
    np.testing.assert_array_equal(await samples(small), whole("s"))
    assert fake.batches == [["big", "small"], ["big"]]


async def test_tries_are_bounded() -> None:
    fake = FakeDispatch(replicas=2)
    queue = queue_over(fake)

    def die(replica: str, step: int) -> None:
        raise ReplicaLost

    fake.before_step = die
    with pytest.raises(EngineFailed, match="3 times"):
        await samples(submit(queue, "a"))
    # Never the same one twice in a row.
    assert fake.used in (["r0", "r1", "r0"], ["r1", "r0", "r1"])


async def test_the_only_replica_is_not_asked_twice(queue: EngineQueue, fake: FakeDispatch) -> None:
    with pytest.raises(EngineFailed, match="It failed"):
        await samples(submit(queue, "bad"))
    assert fake.used == ["r0"]


async def test_replica_that_failed_is_not_asked_again_and_again(
    queue: EngineQueue, fake: FakeDispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot is free all the time, and of no use to the row that waits for another replica."""
    monkeypatch.setattr("serve_app.router.batching._ELSEWHERE_INTERVAL_S", 0.2)
    fake.running = frozenset(("r0", "still starting"))
    slot, asked = fake.slot, 0

    @asynccontextmanager
    async def counted() -> AsyncIterator[Slot]:
        nonlocal asked
        asked += 1
        async with slot() as free:
            yield free

    monkeypatch.setattr(fake, "slot", counted)
    listener = submit(queue, "bad on r0")
    for _ in range(200):
        await asyncio.sleep(0)
    # One for the first try, one that finds only the same replica, at most one more on the way out.
    assert asked <= 3
    fake.free.put_nowait("r1")
    np.testing.assert_array_equal(await samples(listener), whole("b"))


async def test_lost_row_goes_before_new_ones(queue: EngineQueue, fake: FakeDispatch) -> None:
    queue.limits = limits(max_rows=1)
    died = False

    def die_once(replica: str, step: int) -> None:
        nonlocal died
        if step == 2 and not died:
            died = True
            fake.free.put_nowait("another")
            raise ReplicaLost

    fake.before_step = die_once
    for listener in [submit(queue, text) for text in "abc"]:
        await samples(listener)
    assert fake.batches == [["a"], ["a"], ["b"], ["c"]]


async def test_no_replica_at_all_is_said(queue: EngineQueue, fake: FakeDispatch) -> None:
    fake.no_replica = True
    with pytest.raises(EngineUnavailable):
        await samples(submit(queue, "a"))


async def test_first_utterances_are_bounded_and_later_ones_taken(
    queue: EngineQueue, fake: FakeDispatch
) -> None:
    replica = await fake.free.get()
    rows = [submit(queue, str(number)) for number in range(10)]
    with pytest.raises(Overloaded) as caught:
        submit(queue, "one too many")
    assert caught.value.retry_after_s
    with pytest.raises(Overloaded):
        submit(queue, "bulk", tier=Tier.BULK_FIRST)
    rows.append(submit(queue, "later", tier=Tier.NEXT))
    fake.free.put_nowait(replica)
    for row in rows:
        await samples(row)


async def test_bulk_does_not_keep_interactive_requests_out(queue: EngineQueue, fake: FakeDispatch) -> None:
    replica = await fake.free.get()
    rows = [submit(queue, str(number), tier=Tier.BULK_FIRST) for number in range(10)]
    rows.append(submit(queue, "now"))
    fake.free.put_nowait(replica)
    for row in rows:
        await samples(row)
    assert "now" in fake.batches[0]


async def test_first_utterance_waits_only_so_long(queue: EngineQueue, fake: FakeDispatch) -> None:
    queue.limits = limits(max_wait_s=0.02)
    await fake.free.get()
    row, later = submit(queue, "a"), submit(queue, "b", tier=Tier.NEXT)
    with pytest.raises(QueueTimeout) as caught:
        await samples(row)
    assert caught.value.retry_after_s
    assert queue.waiting == 1
    later.leave()
    assert queue.waiting == 0


async def test_retry_after_follows_the_rate_and_the_queue(queue: EngineQueue, fake: FakeDispatch) -> None:
    assert queue.retry_after_s() == 1.0
    for row in [submit(queue, text) for text in "abcdef"]:
        await samples(row)
    assert 1.0 <= queue.retry_after_s() <= 60.0


async def test_slot_that_never_comes_is_not_waited_for_alone(
    queue: EngineQueue, fake: FakeDispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that never answers the reservation holds up one attempt, not the queue."""
    monkeypatch.setattr("serve_app.router.batching._HEDGE_AFTER_S", 0.02)
    slot, attempts = fake.slot, 0

    @asynccontextmanager
    async def first_hangs() -> AsyncIterator[Slot]:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await asyncio.sleep(3600)
        async with slot() as free:
            yield free

    monkeypatch.setattr(fake, "slot", first_hangs)
    np.testing.assert_array_equal(await samples(submit(queue, "a")), whole("a"))


async def test_second_listener_hears_it_all(queue: EngineQueue, fake: FakeDispatch) -> None:
    row = row_of(queue, "a")
    early = row.join()
    await first_part(early)
    late = row.join()
    early.leave()
    np.testing.assert_array_equal(await samples(late), whole("a"))
    assert fake.stopped == 0


async def test_waiting_row_moves_up_when_it_is_wanted_sooner(queue: EngineQueue, fake: FakeDispatch) -> None:
    replica = await fake.free.get()
    queue.limits = limits(max_rows=1)
    bulk = row_of(queue, "bulk", tier=Tier.BULK_FIRST)
    rows = [bulk.join(), submit(queue, "next", tier=Tier.NEXT)]
    queue.promote(bulk, Tier.FIRST)
    queue.promote(bulk, Tier.BULK_NEXT)
    fake.free.put_nowait(replica)
    for row in rows:
        await samples(row)
    assert fake.batches == [["bulk"], ["next"]]


async def test_replicas_are_called_in_nobodys_name(queue: EngineQueue, fake: FakeDispatch) -> None:
    # Ray finds in the context whose request it serves, and cancels all its calls when that one is left.
    request = ContextVar("request", default="nobody")
    names: set[str] = set()
    fake.before_step = lambda replica, step: names.add(request.get())
    request.set("somebody")
    await samples(submit(queue, "a"))
    assert names == {"nobody"}

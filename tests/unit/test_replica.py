"""A replica without Serve: threads, back-pressure, cancellation, and what an engine's failure becomes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import numpy as np
import pytest

from engines.contract import (
    Chunk,
    Conditioning,
    Reference,
    ReferenceUnusable,
    Samples,
    SynthesisFailed,
    UnsupportedOption,
    Utterance,
)
from engines.tone.engine import ToneEngine, render
from serve_app.protocol import BatchTerms, RowAudio, UtteranceCall
from serve_app.replica import EngineReplica, ThreadStream
from tests.speech import noisy_tone

VOICE = Conditioning("tone", "tone-1", {"pitch_hz": np.asarray([220.0], np.float32)})


def call(text: str, **fields: object) -> UtteranceCall:
    """A row whose id is its text."""
    return UtteranceCall(text, text, "en", VOICE, seed=1, **fields)  # type: ignore[arg-type]


def synthesize(
    replica: EngineReplica, calls: list[UtteranceCall], max_rows: int = 8
) -> AsyncGenerator[list[RowAudio], None]:
    """The answers to ``calls``, which may share a batch with any others."""
    return replica.synthesize(calls, BatchTerms((), max_rows, None))


async def let_go(replica: EngineReplica) -> None:
    """Wait until the engine works on nothing."""
    for _ in range(500):
        if not (await replica.activity()).rows_open:
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def speak(replica: EngineReplica, *batch: UtteranceCall) -> list[Samples]:
    """Samples of each row."""
    rows: list[list[Samples]] = [[] for _ in batch]
    async for answer in synthesize(replica, list(batch)):
        for audio in answer:
            assert audio.error is None
            rows[audio.row].append(audio.samples)
    return [np.concatenate(row) for row in rows]


async def test_batch_comes_back_as_the_engine_made_it() -> None:
    replica = EngineReplica("tone", {})
    one, two = await speak(replica, call("one"), call("two", speed=0.5))
    np.testing.assert_array_equal(one, render(Utterance("one", "en", VOICE, seed=1)))
    assert len(two) == 2 * len(one)
    await let_go(replica)
    activity = await replica.activity()
    assert (activity.rows_open, activity.batches, activity.largest_batch) == (0, 1, 2)


async def test_calls_that_wait_are_one_batch_in_the_end() -> None:
    replica = EngineReplica("tone", {"step_s": 0.05})
    running = asyncio.create_task(speak(replica, call("this one runs")))
    await asyncio.sleep(0.02)
    texts = [f"waits, number {number}" for number in range(5)]
    waited = await asyncio.gather(*(speak(replica, call(text)) for text in texts))
    await running
    for text, (samples,) in zip(texts, waited, strict=True):
        np.testing.assert_array_equal(samples, render(Utterance(text, "en", VOICE, seed=1)))
    activity = await replica.activity()
    assert (activity.batches, activity.largest_batch) == (2, 5)


@pytest.mark.parametrize(
    "terms",
    [BatchTerms(("de",), 8, None), BatchTerms((), 2, None), BatchTerms((), 8, 40)],
    ids=["group", "rows", "characters"],
)
async def test_only_what_goes_together_is_one_batch(terms: BatchTerms) -> None:
    replica = EngineReplica("tone", {"step_s": 0.05})
    running = asyncio.create_task(speak(replica, call("this one runs")))
    await asyncio.sleep(0.02)

    async def ask(number: int, terms: BatchTerms) -> None:
        async for _ in replica.synthesize([call(f"waits, number {number}")], terms):
            pass

    others = [ask(3, BatchTerms(("en",), 8, None))] if terms.group else []
    await asyncio.gather(*(ask(number, terms) for number in range(3)), *others)
    await running
    activity = await replica.activity()
    assert (activity.batches, activity.largest_batch) == ((3, 3) if others else (3, 2))


async def test_calls_that_left_while_they_waited_are_never_spoken() -> None:
    replica = EngineReplica("tone", {"step_s": 0.05})
    running = asyncio.create_task(speak(replica, call("this one runs")))
    await asyncio.sleep(0.02)
    leaves = asyncio.create_task(speak(replica, call("leaves")))
    await asyncio.sleep(0.02)
    leaves.cancel()
    await asyncio.wait({leaves})
    await running
    await let_go(replica)
    assert (await replica.activity()).batches == 1


async def test_batches_run_side_by_side_if_the_engine_can() -> None:
    replica = EngineReplica("tone", {"step_s": 0.05, "batches": 2})
    running = asyncio.create_task(speak(replica, call("this one runs for a while")))
    await asyncio.sleep(0.02)
    (samples,) = await speak(replica, call("joins"))
    assert not running.done()
    np.testing.assert_array_equal(samples, render(Utterance("joins", "en", VOICE, seed=1)))
    await running
    activity = await replica.activity()
    assert (activity.batches, activity.largest_batch) == (2, 1)


async def test_engine_that_only_works_is_heard_to_work() -> None:
    """Empty chunks come through, one by one, and are no sound."""
    replica = EngineReplica("tone", {"silent_steps": 5, "step_s": 0.01})
    answers = [answer async for answer in synthesize(replica, [call("works")])]
    silent = [audio for answer in answers for audio in answer if not len(audio.samples)]
    assert len(silent) >= 5
    assert not any(audio.last for audio in silent)
    samples = np.concatenate([audio.samples for answer in answers for audio in answer])
    np.testing.assert_array_equal(samples, render(Utterance("works", "en", VOICE, seed=1)))


async def test_facts_are_the_cards() -> None:
    facts = await EngineReplica("tone", {"slots": 3}).describe()
    assert facts.slots == 3
    assert facts.card == ToneEngine.card
    assert facts.languages == ToneEngine.card.languages


async def test_abandoned_row_stops_and_the_other_goes_on() -> None:
    replica = EngineReplica("tone", {"step_s": 0.01})
    rows: dict[int, int] = {0: 0, 1: 0}
    async with aclosing(synthesize(replica, [call("leaves " * 10), call("stays " * 10)])) as answers:
        async for answer in answers:
            if rows[0] == 0:
                await replica.abandon(["leaves " * 10, "somebody else"])
            for audio in answer:
                rows[audio.row] += 1
    assert rows[0] < rows[1]
    assert rows[0] <= 10


async def test_closing_stops_the_engine() -> None:
    replica = EngineReplica("tone", {"step_s": 0.01})
    answers = synthesize(replica, [call("word " * 50)])
    await anext(answers)
    await answers.aclose()
    await let_go(replica)
    assert (await replica.activity()).chunks < 10
    await speak(replica, call("next"))


async def test_hanging_engine_is_freed_by_leaving() -> None:
    replica = EngineReplica("tone", {})
    answers = synthesize(replica, [call("please [hang] here")])
    assert await anext(answers) == []
    waiting = asyncio.ensure_future(anext(answers))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await answers.aclose()
    await speak(replica, call("next"))


async def test_failing_row_ends_with_its_error() -> None:
    replica = EngineReplica("tone", {})
    errors = {}
    async for answer in synthesize(replica, [call("[fail]"), call("good"), call("x", options={"a": 1})]):
        errors.update({audio.row: audio.error for audio in answer if audio.last})
    assert isinstance(errors[0], SynthesisFailed)
    assert errors[1] is None
    assert isinstance(errors[2], UnsupportedOption)


async def test_engine_that_raises_fails_the_rows_it_has_not_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: ToneEngine, batch: list[Utterance]) -> Iterator[Chunk]:
        yield Chunk(0, np.ones(5, np.float32), last=True)
        raise ZeroDivisionError

    replica = EngineReplica("tone", {})
    monkeypatch.setattr(ToneEngine, "synthesize", broken)
    ends = {}
    async for answer in synthesize(replica, [call("a"), call("b")]):
        ends.update({audio.row: audio.error for audio in answer if audio.last})
    assert ends[0] is None
    assert isinstance(ends[1], SynthesisFailed)
    assert "ZeroDivision" not in ends[1].message


@pytest.mark.parametrize("text", ["[nan] and more", "[silent] for longer than any pause " + 60 * "a"])
@pytest.mark.parametrize("fault_after_chunks", [0, 2])
async def test_row_that_is_no_speech_fails_alone(text: str, fault_after_chunks: int) -> None:
    replica = EngineReplica("tone", {"fault_after_chunks": fault_after_chunks})
    errors = {}
    heard: dict[int, list[Samples]] = {0: [], 1: []}
    async for answer in synthesize(replica, [call(text), call("good for all of this time as well")]):
        for audio in answer:
            heard[audio.row].append(audio.samples)
            if audio.last:
                errors[audio.row] = audio.error
    assert isinstance(errors[0], SynthesisFailed)
    assert errors[1] is None
    everything = render(Utterance(text, "en", VOICE, seed=1))
    # What was heard before the fault is what a healthy engine says.
    np.testing.assert_array_equal(np.concatenate(heard[0]), everything[: fault_after_chunks * 4800])


async def test_batch_that_waits_says_so_while_the_engine_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.replica._BEAT_S", 0.01)
    replica = EngineReplica("tone", {"step_s": 0.02})
    running = asyncio.create_task(speak(replica, call("this one runs")))
    await asyncio.sleep(0.01)
    async with aclosing(synthesize(replica, [call("this one waits")])) as waiting:
        assert await anext(waiting) == []
    await running


async def test_batch_behind_a_stuck_engine_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.replica._BEAT_S", 0.01)
    replica = EngineReplica("tone", {}, step_timeout_s=0.05)
    stuck = synthesize(replica, [call("[hang]")])
    assert await anext(stuck) == []
    asking = asyncio.ensure_future(anext(stuck))
    await asyncio.sleep(0.3)
    waiting = synthesize(replica, [call("waits")])
    assert await anext(waiting) == []
    first = asyncio.ensure_future(anext(waiting))
    done, _ = await asyncio.wait({first}, timeout=0.2)
    assert not done
    with pytest.raises(RuntimeError, match="not returned"):
        await replica.check_health()
    for task in (first, asking):
        task.cancel()
        await asyncio.wait({task})
    await let_go(replica)
    await replica.check_health()


async def test_failing_texts_do_not_make_a_replica_ill() -> None:
    replica = EngineReplica("tone", {})
    await speak(replica, call("fine"))
    for _ in range(5):
        _ = [answer async for answer in synthesize(replica, [call("[nan]")])]
    await let_go(replica)
    await replica.check_health()
    await speak(replica, call("still fine"))


async def test_engine_that_can_no_longer_speak_is_ill(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = EngineReplica("tone", {})
    await speak(replica, call("fine"))

    def broken(_: ToneEngine, batch: list[Utterance]) -> Iterator[Chunk]:
        for row in range(len(batch)):
            yield Chunk(row, np.full(5, np.nan, np.float32), last=True)

    monkeypatch.setattr(ToneEngine, "synthesize", broken)
    for _ in range(3):
        await replica.check_health()
        _ = [answer async for answer in synthesize(replica, [call("anything")])]
    await let_go(replica)
    with pytest.raises(RuntimeError, match="no longer"):
        await replica.check_health()


async def test_engine_that_never_spoke_is_ill() -> None:
    replica = EngineReplica("tone", {})
    for _ in range(3):
        _ = [answer async for answer in synthesize(replica, [call("[fail]")])]
    await let_go(replica)
    with pytest.raises(RuntimeError, match="never spoken"):
        await replica.check_health()


async def test_refused_reference_is_an_answer() -> None:
    replica = EngineReplica("tone", {})
    silence = Reference(np.zeros(48_000, np.float32), 24_000)
    assert isinstance(await replica.extract_voice(silence), ReferenceUnusable)
    good = Reference(noisy_tone(150.0), 24_000)
    conditioning = await replica.extract_voice(good)
    assert isinstance(conditioning, Conditioning)
    assert await replica.refine_voice(good, conditioning) is None


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """One thread."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


async def test_thread_runs_only_so_far_ahead(executor: ThreadPoolExecutor) -> None:
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    stream = ThreadStream(count, executor, max_ahead=4)
    items = aiter(stream)
    await anext(items)
    await asyncio.sleep(0.1)
    assert len(made) <= 4 + 4 + 1
    await stream.aclose()


async def test_iterator_is_closed_by_its_own_thread(executor: ThreadPoolExecutor) -> None:
    threads: list[str] = []

    def numbers() -> Iterator[int]:
        threads.append(threading.current_thread().name)
        try:
            while True:
                time.sleep(0.001)
                yield 1
        finally:
            threads.append(threading.current_thread().name)

    stream = ThreadStream(numbers, executor, max_ahead=2)
    items: AsyncIterator[list[int]] = aiter(stream)
    await anext(items)
    await stream.aclose()
    assert len(threads) == 2
    assert threads[0] == threads[1]

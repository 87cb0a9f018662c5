"""One request's utterances: order, look-ahead, slow listeners, and what is shared between requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import numpy as np
import pytest

from engines.contract import Conditioning, Samples
from serve_app.errors import EngineFailed, ListenerStalled
from serve_app.metrics import Metrics
from serve_app.protocol import UtteranceCall
from serve_app.router.reuse import SeedsInUse, SpokenUtterances, content_key
from serve_app.router.rows import Recording, Row
from serve_app.router.speech import Playback, Speech

RATE_HZ = 100
VOICE = Conditioning("fake", "1", {})
METRICS = Metrics()


def call(text: str = "text", seed: int = 1) -> UtteranceCall:
    """An utterance."""
    return UtteranceCall("", text, "en", VOICE, seed=seed)


class Studio:
    """Makes the recordings of a speech, by hand or at once."""

    def __init__(self, seconds_each: float | None = None) -> None:
        self.recordings: list[Recording] = []
        self._seconds_each = seconds_each

    def listen(self, index: int):  # type: ignore[no-untyped-def]
        """The next utterance."""
        assert index == len(self.recordings)
        recording = Recording()
        if self._seconds_each is not None:
            recording.add(np.full(round(self._seconds_each * RATE_HZ), index, np.float32))
            recording.end()
        self.recordings.append(recording)
        return recording.join()


def speech(
    utterances: int, studio: Studio, playback: Playback, *, ahead: int = 100, ahead_s: float = 1e9
) -> Speech:
    """A speech of ``studio``."""
    return Speech(
        utterances,
        studio.listen,
        playback,
        look_ahead_utterances=ahead,
        look_ahead_s=ahead_s,
        stall_timeout_s=30,
    )


def deaf() -> Playback:
    """A listener who takes everything at once."""
    return Playback(RATE_HZ, reports=False)


async def collected(parts: AsyncGenerator[Samples, None]) -> Samples:
    """All samples."""
    async with aclosing(parts):
        return np.concatenate([part async for part in parts])


async def settle() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_utterances_are_heard_in_order_whatever_order_they_come_in() -> None:
    studio = Studio()
    listening = asyncio.create_task(collected(speech(3, studio, deaf()).parts()))
    await settle()
    for index in (2, 0, 1):
        studio.recordings[index].add(np.full(5, index, np.float32))
        studio.recordings[index].end()
        await settle()
    np.testing.assert_array_equal(await listening, np.repeat([0, 1, 2], 5))


@pytest.mark.parametrize("ahead", [1, 3])
async def test_look_ahead_is_bounded_in_utterances(ahead: int) -> None:
    studio = Studio()
    listening = asyncio.create_task(collected(speech(9, studio, deaf(), ahead=ahead).parts()))
    for heard in range(9):
        await settle()
        assert len(studio.recordings) == min(heard + ahead, 9)
        studio.recordings[heard].add(np.ones(1, np.float32))
        studio.recordings[heard].end()
    assert len(await listening) == 9


async def test_slow_listener_stops_its_own_look_ahead() -> None:
    studio = Studio(seconds_each=1.0)
    playback = Playback(RATE_HZ, reports=True)
    parts = speech(100, studio, playback, ahead=4, ahead_s=3.0).parts()
    sent = [await anext(parts) for _ in range(3)]
    waiting = asyncio.ensure_future(anext(parts))
    await settle()
    # Three seconds are on their way, and the fourth waits to be sent: nothing more is asked for.
    assert not waiting.done()
    assert len(studio.recordings) <= 4
    playback.heard(len(sent[0]))
    await waiting
    assert playback.unheard_s == 3.0
    await parts.aclose()
    assert all(recording.left for recording in studio.recordings)


async def test_listener_that_takes_nothing_is_given_up() -> None:
    playback = Playback(RATE_HZ, reports=True)
    playback.send(np.zeros(RATE_HZ, np.float32))
    with pytest.raises(ListenerStalled):
        await playback.room(max_unheard_s=0.5, stall_timeout_s=0.01)


async def test_failed_utterance_ends_the_speech_after_those_before_it() -> None:
    studio = Studio()
    parts = speech(3, studio, deaf()).parts()
    first = asyncio.ensure_future(anext(parts))
    await settle()
    studio.recordings[1].end(EngineFailed("It failed."))
    studio.recordings[0].add(np.ones(3, np.float32))
    studio.recordings[0].end()
    assert len(await first) == 3
    with pytest.raises(EngineFailed):
        await anext(parts)
    assert studio.recordings[2].left


def test_late_chunk_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 50.0
    monkeypatch.setattr("serve_app.router.speech.time.monotonic", lambda: now_s)
    playback = deaf()
    playback.send(np.zeros(RATE_HZ, np.float32))
    now_s += 0.9
    playback.send(np.zeros(RATE_HZ, np.float32))
    assert playback.gap_s == 0
    now_s += 1.6
    playback.send(np.zeros(RATE_HZ, np.float32))
    assert playback.gap_s == pytest.approx(0.5)


class Engine:
    """Counts what it is asked to speak."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def make(self, **fields: object) -> Callable[[], Row]:
        """A row."""

        def row() -> Row:
            self.rows.append(Row(call()))
            return self.rows[-1]

        return row


def finish(row: Row, samples: int = 10) -> None:
    """Speak a row."""
    row.deliver(np.ones(samples, np.float32))
    row.end()


async def test_equal_utterances_are_spoken_once() -> None:
    spoken, engine = SpokenUtterances(0, METRICS), Engine()
    joined: list[Row] = []
    listeners = [spoken.listen(b"k", engine.make(), keep=True, joined=joined.append) for _ in range(3)]
    other = spoken.listen(b"other", engine.make(), keep=True)
    assert len(engine.rows) == 2
    assert joined == [engine.rows[0]] * 2
    finish(engine.rows[0])
    for listener in listeners:
        assert len(np.concatenate([part async for part in listener])) == 10
    other.leave()
    assert spoken.making == 0


async def test_leaving_a_shared_recording_leaves_it_to_the_others() -> None:
    spoken, engine = SpokenUtterances(0, METRICS), Engine()
    left: list[bool] = []
    one, two = (spoken.listen(b"k", engine.make(), keep=False) for _ in range(2))
    engine.rows[0].when_done(lambda: left.append(True))
    one.leave()
    assert not left
    two.leave()
    assert left
    spoken.listen(b"k", engine.make(), keep=False)
    assert len(engine.rows) == 2


@pytest.mark.parametrize("keep", [True, False])
async def test_finished_recordings_are_kept_if_asked(keep: bool) -> None:
    spoken, engine = SpokenUtterances(1000, METRICS), Engine()
    spoken.listen(b"k", engine.make(), keep=keep)
    finish(engine.rows[0])
    again = spoken.listen(b"k", engine.make(), keep=keep)
    assert len(engine.rows) == (1 if keep else 2)
    again.leave()


async def test_cache_is_bounded_in_bytes_and_forgets_the_oldest() -> None:
    spoken, engine = SpokenUtterances(100, METRICS), Engine()
    for key in (b"a", b"b", b"c"):
        spoken.listen(key, engine.make(), keep=True)
        finish(engine.rows[-1])
    spoken.listen(b"huge", engine.make(), keep=True)
    finish(engine.rows[-1], samples=1000)
    assert len(spoken) == 2
    for key in (b"b", b"c"):
        spoken.listen(key, engine.make(), keep=True)
    assert len(engine.rows) == 4
    spoken.listen(b"a", engine.make(), keep=True)
    assert len(engine.rows) == 5


@pytest.mark.parametrize("error", [EngineFailed("It failed."), None])
async def test_failed_and_abandoned_recordings_are_not_kept(error: EngineFailed | None) -> None:
    spoken, engine = SpokenUtterances(1000, METRICS), Engine()
    listener = spoken.listen(b"k", engine.make(), keep=True)
    engine.rows[0].deliver(np.ones(3, np.float32))
    if error is None:
        listener.leave()
    else:
        engine.rows[0].end(error)
    assert (len(spoken), spoken.making) == (0, 0)


def test_every_field_that_changes_the_sound_changes_the_key() -> None:
    base = call()
    others = [
        call("other"),
        call(seed=2),
        UtteranceCall("", "text", "de", VOICE, seed=1),
        UtteranceCall("", "text", "en", VOICE, seed=1, speed=1.5),
        UtteranceCall("", "text", "en", VOICE, seed=1, options={"a": 1}),
        UtteranceCall("", "text", "en", Conditioning("fake", "2", {}), seed=1),
        UtteranceCall("", "text", "en", Conditioning("other", "1", {}), seed=1),
    ]
    keys = {content_key(base, "v1"), content_key(base, "v2"), *(content_key(o, "v1") for o in others)}
    assert len(keys) == len(others) + 2
    assert content_key(UtteranceCall("another id", "text", "en", VOICE, seed=1), "v1") in keys


def test_seed_is_shared_only_while_it_is_in_use() -> None:
    drawn = iter(range(100))
    seeds = SeedsInUse(lambda: next(drawn))
    with seeds.seed_for("a") as one, seeds.seed_for("a") as two, seeds.seed_for("b") as other:
        assert one == two != other
    with seeds.seed_for("a") as later:
        assert later not in (one, other)

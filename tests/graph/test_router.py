"""The router under several requests at once: fairness, look-ahead, sharing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

import numpy as np
import pytest

from serve_app.app import router_handle
from serve_app.handle import RouterHandle
from serve_app.protocol import AudioFrame, Caller, Priority, SpeechRequest
from tests.graph.conftest import (
    Server,
    activity,
    counted,
    eventually,
    exported,
    places_taken,
    router_activity,
)

RATE_HZ = 24_000


def request(text: str, client: str = "somebody", engine: str = "pair", **fields: object) -> SpeechRequest:
    """A request of a client, to the one-row-at-a-time engine if not to another."""
    caller = Caller(address=client)
    return SpeechRequest(text, "anna", engine, caller=caller, **fields)  # type: ignore[arg-type]


async def spoken(*requests: SpeechRequest, order: list[str] | None = None) -> list[np.ndarray]:
    """Samples of all requests, spoken at once; ``order`` gets the clients as they are done."""
    router = RouterHandle(router_handle())

    async def speak(wanted: SpeechRequest) -> np.ndarray:
        frames = [frame.samples async for frame in router.speak(wanted) if isinstance(frame, AudioFrame)]
        if order is not None:
            order.append(wanted.caller.address)
        return np.concatenate(frames)

    work: list[Awaitable[np.ndarray]] = [speak(wanted) for wanted in requests]
    return list(await asyncio.gather(*work))


def test_long_text_comes_in_order_from_many_replicas(server: Server) -> None:
    sentences = [f"Sentence {number} of this text is here." for number in range(12)]
    (whole,) = asyncio.run(spoken(request(" ".join(sentences), seed=4)))
    before = sum(replica.batches for replica in activity("pair"))
    singles = asyncio.run(
        # Utterance n of a request is spoken with the request's seed plus n.
        spoken(*(request(sentence, seed=4 + number) for number, sentence in enumerate(sentences)))
    )
    np.testing.assert_array_equal(whole, np.concatenate(singles))
    assert all(replica.batches for replica in activity("pair"))
    assert sum(replica.batches for replica in activity("pair")) == before + len(sentences)


def test_greedy_client_does_not_hold_up_another(server: Server) -> None:
    greedy = [request(f"Request number {number} of many.", "greedy") for number in range(40)]
    order: list[str] = []
    asyncio.run(spoken(*greedy, request("Only this one.", "modest"), order=order))
    assert order.index("modest") < 12


@pytest.mark.parametrize("engine", ["shaky", "unreserved"])
def test_requests_of_many_clients_share_batches(server: Server, engine: str) -> None:
    def texts(number: int) -> SpeechRequest:
        return request(f"Request number {number}.", str(number), engine, seed=number)

    alone = [asyncio.run(spoken(texts(number)))[0] for number in range(12)]
    before = sum(replica.batches for replica in activity(engine))
    together = asyncio.run(spoken(*(texts(number) for number in range(12))))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(replica.largest_batch for replica in activity(engine)) == 2
    assert sum(replica.batches for replica in activity(engine)) - before < 12


def test_interactive_goes_before_bulk(server: Server) -> None:
    bulk = [
        request(f"Request number {number} can wait.", str(number), priority=Priority.BULK)
        for number in range(20)
    ]
    order: list[str] = []
    asyncio.run(spoken(*bulk, request("This one cannot.", "soon"), order=order))
    assert order.index("soon") < 8


def test_slow_reader_stops_its_own_look_ahead(server: Server) -> None:
    book = " ".join(f"This is sentence number {number} of a very long book." for number in range(80))
    wanted = SpeechRequest(book, "anna", "tone", seed=9)

    def spoken_chunks() -> int:
        return sum(replica.chunks for replica in activity("tone"))

    async def read_slowly() -> np.ndarray:
        before = await asyncio.to_thread(spoken_chunks)
        stream = RouterHandle(router_handle()).speak(wanted)
        await anext(stream)
        first = await anext(stream)
        assert isinstance(first, AudioFrame)
        # An engine that is not held back has spoken the whole book once its counter stands still.
        ahead, last = 0, -1
        while ahead != last:
            await asyncio.sleep(1.0)
            ahead, last = await asyncio.to_thread(spoken_chunks) - before, ahead
        # 0.2 s each: six seconds on their way, eight utterances of about three seconds, some in hand.
        assert ahead * 0.2 < 6 + 8 * 4 + 10
        rest = [frame.samples async for frame in stream if isinstance(frame, AudioFrame)]
        return np.concatenate([first.samples, *rest])

    characters = sum(character.isalnum() for character in book)
    assert len(asyncio.run(read_slowly())) == characters * round(0.06 * RATE_HZ)


def test_equal_requests_are_spoken_once(server: Server) -> None:
    wanted = SpeechRequest("Everybody asks for this one.", "anna", "slow")
    before = sum(replica.chunks for replica in activity("slow"))
    one, two, three = asyncio.run(spoken(wanted, wanted, wanted))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)
    assert sum(replica.chunks for replica in activity("slow")) - before == -(-len(one) // 4800)
    later = asyncio.run(spoken(wanted))[0]
    assert not np.array_equal(one, later)


def test_nothing_is_left_behind(server: Server) -> None:
    def idle() -> bool:
        held = router_activity()
        return (held.requests, held.waiting, held.speaking, held.recordings, held.readers) == (0,) * 5

    eventually(idle)


def test_clients_that_leave_at_once_keep_no_place(server: Server) -> None:
    chance = random.Random(1)  # noqa: S311 - only has to be the same every time

    async def leave(number: int) -> None:
        speaking = asyncio.create_task(spoken(request(f"Number {number} is gone.", str(number), "tone")))
        await asyncio.sleep(chance.uniform(0, 0.4))
        speaking.cancel()
        await asyncio.wait([speaking])

    async def crowd() -> None:
        for _ in range(6):
            await asyncio.gather(*map(leave, range(40)))

    asyncio.run(crowd())
    eventually(lambda: places_taken("tone") == 0)


def test_metrics_are_exported(server: Server) -> None:
    asyncio.run(spoken(request("This is counted.")))
    series = {
        "tts_requests_total",
        "tts_first_audio_seconds_count",
        "tts_waiting_utterances",
        "tts_batch_rows_count",
    }
    eventually(lambda: series <= {name for name, _, _ in exported()}, timeout_s=60)


def test_clients_that_leave_are_counted_exactly(server: Server) -> None:
    def ended() -> tuple[float, ...]:
        outcomes = ("cancelled", "complete", "failed")
        return tuple(counted("tts_requests_total", engine="counted", outcome=outcome) for outcome in outcomes)

    body = {"model": "counted", "voice": "anna", "input": "word " * 40, "response_format": "pcm"}
    for _ in range(6):
        with server.http.stream("POST", "/v1/audio/speech", json=body) as answer:
            next(answer.iter_raw())
    server.http.post("/v1/audio/speech", json={**body, "input": "Heard."}).raise_for_status()
    eventually(lambda: ended() == (6, 1, 0), timeout_s=60)

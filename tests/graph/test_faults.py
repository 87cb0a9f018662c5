"""Engines and replicas that fail while they speak: nobody hears it, or the client is told."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from ray.exceptions import RayActorError

from tests.graph.conftest import TICKET, Server, activity, eventually, router_activity
from tests.graph.test_speech import pcm


def replicas_are_up(engine: str, count: int, without: int = 0) -> bool:
    """True if ``count`` replicas answer and none of them is process ``without``."""
    try:
        alive = {replica.process.process_id for replica in activity(engine)}
    except RayActorError:
        return False  # still counted among the living
    return len(alive) == count and without not in alive


@pytest.mark.parametrize("fault", ["fail", "nan", "silent", "hang", "crash"])
@pytest.mark.parametrize("engine", ["shaky", "unreserved"])
def test_fault_of_one_replica_is_not_heard(server: Server, engine: str, fault: str) -> None:
    text = f"This sentence is long enough that [{fault}] happens in the middle and not at the end. Twice."
    undisturbed = pcm(server, text, model=engine, seed=5)
    TICKET.touch()
    np.testing.assert_array_equal(pcm(server, text, model=engine, seed=5), undisturbed)
    assert not TICKET.exists(), "the fault never happened"
    eventually(lambda: replicas_are_up(engine, 2), timeout_s=60)


def test_killed_replica_is_not_heard(server: Server) -> None:
    text = " ".join(f"Sentence number {number} goes on for quite some time." for number in range(8))
    undisturbed = pcm(server, text, model="pair", seed=11)
    heard: list[np.ndarray] = []
    listener = threading.Thread(target=lambda: heard.append(pcm(server, text, model="pair", seed=11)))
    listener.start()
    busy: list[int] = []

    def somebody_speaks() -> bool:
        busy[:] = [replica.process.process_id for replica in activity("pair") if replica.rows_open]
        return bool(busy)

    eventually(somebody_speaks)
    os.kill(busy[0], signal.SIGKILL)
    listener.join()
    np.testing.assert_array_equal(undisturbed, heard[0])
    eventually(lambda: replicas_are_up("pair", 2, without=busy[0]), timeout_s=60)


def test_another_engine_speaks_in_place_of_one_that_cannot(server: Server) -> None:
    body = {"model": "mute", "voice": "anna", "input": "Hello there.", "response_format": "pcm", "seed": 3}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-engine"] == "tone"
    np.testing.assert_array_equal(
        np.frombuffer(answer.content, "<i2"), pcm(server, "Hello there.", model="tone", seed=3)
    )


def test_fallback_of_the_request_wins(server: Server) -> None:
    body = {"model": "mute", "voice": "anna", "input": "Hello there.", "response_format": "pcm"}
    asked = server.http.post("/v1/audio/speech", json={**body, "fallback_engines": ["slow"]})
    assert asked.headers["x-engine"] == "slow"
    refused = server.http.post("/v1/audio/speech", json={**body, "fallback_engines": []})
    assert refused.status_code == 500
    assert refused.json()["error"]["code"] == "engine_error"
    unknown = server.http.post("/v1/audio/speech", json={**body, "fallback_engines": ["nope"]})
    assert unknown.status_code == 404


def test_bad_request_is_no_reason_to_fall_back(server: Server) -> None:
    body = {"model": "mute", "voice": "anna", "input": "Hello.", "engine_options": {"nope": 1}}
    assert server.http.post("/v1/audio/speech", json=body).status_code == 400


def test_nothing_is_left_behind(server: Server) -> None:
    def idle() -> bool:
        held = router_activity()
        return (held.requests, held.waiting, held.speaking, held.recordings, held.readers) == (0,) * 5

    eventually(idle)

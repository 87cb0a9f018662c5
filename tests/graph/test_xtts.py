"""XTTS-v2 with random weights behind HTTP: many streams, listeners that leave, a replica that is killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve

from serve_app.app import build_app
from serve_app.config import Settings
from serve_app.protocol import ReplicaActivity
from tests.checkpoints.xtts import write_checkpoint
from tests.graph.conftest import Server, eventually
from tests.speech import noisy_tone, wav_bytes

APP = "xtts"
VOICES = 8
STREAMS = 32


@pytest.fixture(scope="module")
def xtts(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Client of an application of its own, with two replicas and eight voices."""
    # Speech of 0.4 s: what is tested here is who gets which, not how long it is.
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), stop_after=9)
    settings: dict[str, Any] = {
        "engines": {
            "xtts": {
                "config": {
                    "slots": 8,
                    "model_dir": str(folder),
                    "accept_license": True,
                    "device": "cpu",
                    "window_tokens": [5, 20],
                },
                "replicas": {"num_cpus": 0.1, "min_replicas": 2, "max_replicas": 2},
            }
        },
        "voices": {"store": str(tmp_path_factory.mktemp("store"))},
        # Two cores for all of this: slow is not broken.
        "limits": {
            "first_audio_timeout_s": 200,
            "max_queue_wait_s": 200,
            "max_redo_wait_s": 200,
            "total": {"requests_per_minute": None},
            "per_ip": {"requests_per_minute": None},
        },
    }
    serve.run(build_app(Settings.model_validate(settings)), name=APP, route_prefix=f"/{APP}")
    with httpx.Client(base_url=f"{server.url}/{APP}", timeout=250) as http:
        for number in range(VOICES):
            sample = {"audio_sample": ("voice.wav", wav_bytes(noisy_tone(90.0 + 25 * number, 2.0)))}
            http.post("/v1/audio/voices", data={"name": f"voice{number}"}, files=sample).raise_for_status()
        yield http
    serve.delete(APP)


def request(number: int) -> dict[str, Any]:
    """One of many requests, no two alike."""
    return {
        "model": "xtts",
        "voice": f"voice{number % VOICES}",
        "input": f"Number {number} says hello." if number % 2 else f"Nummer {number} grüßt.",
        "language": "en" if number % 2 else "de",
        "speed": 1.0 if number % 3 else 1.2,
        "seed": number,
        "response_format": "pcm",
    }


def heard(http: httpx.Client, body: dict[str, Any]) -> bytes:
    """All of a streamed answer."""
    with http.stream("POST", "/v1/audio/speech", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        return b"".join(answer.iter_bytes())


def leave_early(http: httpx.Client, body: dict[str, Any]) -> None:
    """Hear the beginning of a long answer and hang up."""
    with http.stream("POST", "/v1/audio/speech", json={**body, "input": body["input"] * 6}) as answer:
        next(answer.iter_bytes(), None)


def replicas() -> list[ReplicaActivity]:
    handle = serve.get_deployment_handle("engine-xtts", app_name=APP)
    answers: list[ReplicaActivity] = handle.broadcast("activity").results()
    return answers


def test_many_streams_are_each_what_they_are_alone(xtts: httpx.Client) -> None:
    bodies = [request(number) for number in range(STREAMS)]
    leaving = [request(100 + number) for number in range(6)]
    with ThreadPoolExecutor(STREAMS + len(leaving)) as pool:
        gone = [pool.submit(leave_early, xtts, body) for body in leaving]
        streams = [pool.submit(heard, xtts, body) for body in bodies]
        together = [stream.result() for stream in streams]
        for leaver in gone:
            leaver.result()
    assert len(set(together)) == STREAMS
    eventually(lambda: not any(replica.rows_open for replica in replicas()), timeout_s=60)
    for body, expected in zip(bodies, together, strict=True):
        assert heard(xtts, body) == expected


def test_speakers_of_the_checkpoint_are_voices(xtts: httpx.Client) -> None:
    listed = xtts.get("/v1/audio/voices").json()["data"]
    assert [voice["type"] for voice in listed] == ["audio_sample"] * VOICES + ["built_in"] * 2
    speaker = listed[-1]
    assert speaker["model"] == "xtts"
    assert xtts.get(f"/v1/audio/voices/{speaker['id']}").json() == speaker
    spoken = {heard(xtts, {**request(1), "voice": voice["name"]}) for voice in (*listed[-2:], listed[0])}
    assert len(spoken) == 3
    assert heard(xtts, {**request(1), "voice": speaker["id"]}) in spoken
    refused = xtts.delete(f"/v1/audio/voices/{speaker['id']}")
    assert refused.status_code == 404
    assert "cannot be deleted" in refused.json()["error"]["message"]


def test_listing_goes_on_from_enrolled_to_built_in_voices(xtts: httpx.Client) -> None:
    every = [voice["id"] for voice in xtts.get("/v1/audio/voices").json()["data"]]
    found: list[str] = []
    more = True
    while more:
        query = {"limit": "3", **({"after": found[-1]} if found else {})}
        page = xtts.get("/v1/audio/voices", params=query).json()
        found += [voice["id"] for voice in page["data"]]
        more = page["has_more"]
    assert found == every


def test_killed_replica_is_not_heard(xtts: httpx.Client) -> None:
    text = " ".join(f"Sentence number {number} goes on for some time." for number in range(12))
    body = {**request(1), "input": text}
    undisturbed = heard(xtts, body)
    answers: list[bytes] = []
    listener = threading.Thread(target=lambda: answers.append(heard(xtts, body)))
    listener.start()
    busy: list[int] = []

    def somebody_speaks() -> bool:
        busy[:] = [replica.process.process_id for replica in replicas() if replica.rows_open]
        return bool(busy)

    eventually(somebody_speaks)
    os.kill(busy[0], signal.SIGKILL)
    listener.join()
    assert len(undisturbed) > 24_000
    np.testing.assert_array_equal(np.frombuffer(undisturbed, "<i2"), np.frombuffer(answers[0], "<i2"))

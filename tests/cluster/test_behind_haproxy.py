"""As in production: HAProxy in front of the ingress, Serve's throughput settings, two routers.

Limits, and a reader that is slower than speech.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from benchmarks.ports import free_port
from tests.cluster.conftest import BIN, Program, haproxy_environment, look_inside, raw_speech_request
from tests.cluster.test_command_line import wait_ready
from tests.speech import noisy_tone, wav_bytes

SENTENCES = 600
BOOK = " ".join(f"This is sentence number {number} of a very long book." for number in range(SENTENCES))
CHUNK_S = 0.2
LONG = "This is a long text that goes on and on for a while. " * 40


@pytest.fixture(scope="module")
def served(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, str]]]:
    """A server behind HAProxy, which is trusted as if another proxy in front of it told addresses."""
    folder = tmp_path_factory.mktemp("haproxy")
    settings = {
        "engines": {
            "tone": {"replicas": {"num_cpus": 0.1}},
            "slow": {"engine": "tone", "config": {"step_s": 0.1}, "replicas": {"num_cpus": 0.1}},
        },
        "router": {"min_replicas": 2, "max_replicas": 2},
        "limits": {"per_ip": {"requests_per_minute": 3}, "max_input_chars": len(BOOK)},
        "anonymous": ["speak"],
        "voices": {"shared": ["owner"]},
        "keys": {
            name: {"sha256": hashlib.sha256(name.encode()).hexdigest(), **quota}
            for name, quota in {"owner": {}, "narrow": {"concurrent": 1}}.items()
        },
        "trusted_proxies": ["127.0.0.1"],
    }
    config = folder / "settings.yaml"
    # JSON is YAML too.
    config.write_text(json.dumps(settings))
    port = free_port()
    program = Program(
        BIN / "voice-clone",
        "serve",
        "--config",
        config,
        "--port",
        str(port),
        environment={**environment, **haproxy_environment(Path(environment["RAY_TMPDIR"]))},
    )
    found = f"http://127.0.0.1:{port}"
    try:
        wait_ready(found, program)
        sample = {"audio_sample": ("me.wav", wav_bytes(noisy_tone(150.0)))}
        owner = {"authorization": "Bearer owner"}
        httpx.post(
            f"{found}/v1/audio/voices", data={"name": "me"}, files=sample, headers=owner, timeout=60
        ).raise_for_status()
        yield found, environment
    finally:
        program.stop()
        program.kill_all()


@pytest.fixture
def url(served: tuple[str, dict[str, str]]) -> str:
    return served[0]


def body(text: str = "Hello.", model: str = "tone") -> dict[str, str]:
    return {"model": model, "voice": "me", "input": text, "response_format": "pcm"}


def speak(url: str, **headers: str) -> int:
    return httpx.post(f"{url}/v1/audio/speech", json=body(), headers=headers, timeout=60).status_code


def test_addresses_are_those_that_a_proxy_in_front_tells(url: str) -> None:
    told = {"x-forwarded-for": "1.2.3.4"}
    assert [speak(url, **told) for _ in range(5)] == [200, 200, 200, 429, 429]
    assert speak(url, **{"x-forwarded-for": "6.6.6.6, 1.2.3.4"}) == 429
    assert speak(url, **{"x-forwarded-for": "1.2.3.5"}) == 200
    # HAProxy adds no address of its own: without one, nobody shares a limit with everybody.
    assert [speak(url) for _ in range(6)] == [200] * 6


def test_slots_come_back_when_clients_leave(url: str) -> None:
    narrow = {"authorization": "Bearer narrow"}
    for _ in range(3):
        request = {"json": body(LONG, "slow"), "headers": narrow, "timeout": 60}
        with httpx.stream("POST", f"{url}/v1/audio/speech", **request) as answer:  # type: ignore[arg-type]
            assert answer.status_code == 200
            assert [speak(url, **narrow) for _ in range(4)] == [429] * 4
        deadline_s = time.monotonic() + 20
        while speak(url, **narrow) != 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert [speak(url, **narrow) for _ in range(6)] == [200] * 6


def test_a_socket_is_told_the_status_and_a_page_of_others_is_refused(url: str) -> None:
    place = url.replace("http", "ws") + "/ws"
    with connect(place, additional_headers={"authorization": "Bearer owner"}, open_timeout=30) as watcher:
        heard = json.loads(watcher.recv(timeout=30))
        assert (heard["type"], heard["data"]["engines"]["tone"]["ready"]) == ("system_status", 1)
        watcher.send('{"type": "ping"}')
        while json.loads(watcher.recv(timeout=30))["type"] != "pong":
            pass
    with pytest.raises(InvalidStatus) as refused, connect(place, origin=Origin("https://evil.example")):
        pass
    assert refused.value.response.status_code == 403


def test_live_session_speaks_while_it_is_written_and_stops_when_it_is_left(
    served: tuple[str, dict[str, str]],
) -> None:
    url, environment = served

    def rows_open() -> int:
        replicas = look_inside(environment)["held"]["engine-slow"]
        return sum(int(replica["rows_open"]) for replica in replicas)

    messages: list[dict[str, Any]] = []
    sound = b""
    with connect(f"{url.replace('http', 'ws', 1)}/v1/audio/speech/stream") as live:
        live.send(json.dumps({"type": "session.config", "model": "slow", "voice": "me"}))
        live.send(json.dumps({"type": "input.text", "text": "A sentence. And half of ano"}))
        while not messages or messages[-1]["type"] != "audio.done":
            frame = live.recv(timeout=60)
            if isinstance(frame, bytes):
                sound += frame
            else:
                messages.append(json.loads(frame))
        assert messages[0]["sentence_text"] == "A sentence. "
        assert len(sound) == 2 * 24 * messages[-1]["duration_ms"]
        live.send(json.dumps({"type": "input.text", "text": "ther. " + LONG}))
        while not isinstance(live.recv(timeout=60), bytes):
            pass
        assert rows_open() > 0
    deadline_s = time.monotonic() + 20
    while rows_open():
        assert time.monotonic() < deadline_s


def test_slow_reader_holds_its_own_engine_back(served: tuple[str, dict[str, str]]) -> None:
    """1 KB a second of a book: what is ahead of the reader lies in sockets and in the look-ahead, bounded."""
    url, environment = served

    def spoken_s() -> float:
        replicas = look_inside(environment)["held"]["engine-tone"]
        return CHUNK_S * sum(int(replica["chunks"]) for replica in replicas)

    before_s = spoken_s()
    data = json.dumps(body(BOOK)).encode()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(60)
        reader.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        reader.sendall(raw_speech_request(data))
        assert reader.recv(1024).startswith(b"HTTP/1.1 200")
        ahead_s, last_s = 0.0, -1.0
        while ahead_s != last_s:
            for _ in range(4):
                time.sleep(1)
                assert reader.recv(1024)
            ahead_s, last_s = spoken_s() - before_s, ahead_s
    characters = sum(character.isalnum() for character in BOOK)
    # Linux lets a socket hold some megabytes, of 48 kB a second, in each of two connections.
    assert ahead_s < 60 + 8 * 4 + 2 * 140
    assert ahead_s < characters * 0.06 / 3

"""The v3 dialect beside speech and voices: batches, nodes, commands, announcements and ``/ws``."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import SHUT_RDWR
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.graph.conftest import SECRETS, SETTINGS, Server, eventually
from tests.speech import read_audio

NODE_FIELDS = {
    "node_id", "engine_type", "host", "port", "status", "model_loaded", "registered_at", "last_heartbeat",
    "cpu_percent", "memory_percent", "gpu_percent", "gpu_memory_percent", "request_count", "error_count",
    "avg_response_time", "current_concurrent",
}  # fmt: skip


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


# --- batches --------------------------------------------------------------------------------------------


def test_a_batch_gives_the_audio_of_each_text(server: Server) -> None:
    texts = ["One.", "Two and a little more.", "please [fail]", "…"]
    body = {"texts": texts, "voice_id": "anna", "language": "en"}
    answer = server.http.post("/api/batch_synthesize", json=body)
    assert answer.status_code == 200, answer.text
    batch = answer.json()
    assert (batch["success"], batch["total"], batch["succeeded"], batch["failed"]) == (False, 4, 2, 2)
    assert [result["index"] for result in batch["results"]] == [0, 1, 2, 3]
    for result in batch["results"][:2]:
        audio = base64.b64decode(result["audio"])
        samples, rate_hz = read_audio(audio)
        assert result["media_type"] == "audio/wav"
        assert result["size"] == len(audio)
        assert result["duration_ms"] == pytest.approx(1000 * len(samples) / rate_hz, abs=1)
    assert [result.get("code") for result in batch["results"]] == [
        None,
        None,
        "ENGINE_ERROR",
        "INVALID_REQUEST",
    ]
    assert "audio" not in batch["results"][2]


def test_a_batch_in_another_format(server: Server) -> None:
    body = {"texts": ["One."], "voice_id": "anna", "output_format": "flac", "speed": 1.5}
    (result,) = server.http.post("/api/batch_synthesize", json=body).json()["results"]
    assert base64.b64decode(result["audio"])[:4] == b"fLaC"


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"voice_id": "nobody"}, 404, "VOICE_NOT_FOUND"),
        ({"engine": "nope"}, 404, "NODE_NOT_FOUND"),
        ({"texts": []}, 400, "INVALID_REQUEST"),
        ({"texts": ["a"] * 101}, 400, "INVALID_REQUEST"),
        ({"texts": [""]}, 400, "INVALID_REQUEST"),
        ({"texts": ["a" * 5000] * 5}, 400, "INVALID_REQUEST"),
        ({"texts": "One."}, 400, "INVALID_REQUEST"),
        ({"pitch": 1.5}, 400, "INVALID_REQUEST"),
    ],
)
def test_a_batch_of_which_nothing_can_be_spoken_is_an_error(
    server: Server, fields: dict[str, Any], status: int, code: str
) -> None:
    body = {"texts": ["One.", "Two."], "voice_id": "anna", **fields}
    answer = server.http.post("/api/batch_synthesize", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


# --- nodes ----------------------------------------------------------------------------------------------


def nodes(server: Server, **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get("/api/nodes", params=query).json()["nodes"]
    return found


def test_nodes_are_the_replicas_that_run(server: Server) -> None:
    found = nodes(server)
    assert {node["engine_type"] for node in found} == {*SETTINGS["engines"], "english", "reading"}
    pair = nodes(server, engine="pair")
    assert len(pair) == len({node["node_id"] for node in pair}) == 2
    for node in pair:
        assert set(node) == NODE_FIELDS
        assert (node["status"], node["model_loaded"]) == ("ready", True)
        assert node["host"]
        assert 0 < node["registered_at"] < time.time()
        assert node["memory_percent"] > 0
        assert server.http.get(f"/api/nodes/{node['node_id']}").json()["node_id"] == node["node_id"]
    assert pair[0]["node_id"] in [node["node_id"] for node in nodes(server, status="ready")]
    assert nodes(server, status="standby") == []
    assert nodes(server, engine="nope") == []
    assert server.http.get("/api/nodes?status=sleepy").status_code == 400
    assert server.http.get("/api/nodes/nope").status_code == 404


def test_nodes_count_what_they_speak(server: Server) -> None:
    def counts() -> tuple[int, int]:
        (node,) = nodes(server, engine="resting")
        return node["request_count"] - node["error_count"], node["error_count"]

    spoken, failed = counts()
    for text in ("One.", "Two.", "please [fail]"):
        server.http.post("/api/synthesize", json={"text": text, "voice_id": "anna", "engine": "resting"})
    # A row that fails is tried again.
    eventually(lambda: counts()[0] == spoken + 2 and counts()[1] > failed)


def test_an_engine_stands_by_and_is_activated_again(server: Server) -> None:
    body = {"text": "Hello.", "voice_id": "anna", "engine": "resting"}
    assert server.http.post("/api/synthesize", json=body).status_code == 200
    (node,) = nodes(server, engine="resting")

    def command(node_id: str, name: str) -> httpx.Response:
        return server.http.post(f"/api/nodes/{node_id}/command", json={"command": name})

    def statuses() -> list[str]:
        return [one["status"] for one in nodes(server, engine="resting")]

    with watching(server) as socket:
        hear(socket, of_type("system_status"))
        # The first look is what later ones are compared with.
        time.sleep(1.5)
        assert command(node["node_id"], "standby").json() == {"success": True, "engine": "resting"}
        gone = hear(socket, of_type("node_offline"))
        assert gone["data"] == {"node_id": node["node_id"]}
        eventually(lambda: statuses() == ["standby"], 60)
        assert command("resting", "activate").status_code == 200
        come = hear(socket, of_type("node_online"))
        assert come["data"]["engine_type"] == "resting"
        eventually(lambda: statuses() == ["ready"], 60)
    assert server.http.post("/api/synthesize", json=body).status_code == 200
    for name, status in (("start", 400), ("stop", 400), ("explode", 400)):
        assert command("resting", name).status_code == status
    assert command("nope", "standby").status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/nodes/register"), ("POST", "/api/nodes/w1/heartbeat"), ("DELETE", "/api/nodes/w1")],
)
def test_workers_of_the_old_system_are_told_why(server: Server, method: str, path: str) -> None:
    answer = server.http.request(
        method, path, json={"node_id": "w1", "engine_type": "xtts", "host": "h", "port": 1}
    )
    assert answer.status_code == 410
    assert "join it to the Ray cluster" in answer.json()["message"]


@pytest.mark.parametrize("who", ["reader", "studio"])
def test_only_admins_see_and_command_nodes(server: Server, who: str) -> None:
    for method, path in (
        ("GET", "/api/nodes"),
        ("GET", "/api/nodes/pair"),
        ("POST", "/api/nodes/pair/command"),
        ("POST", "/api/announcements"),
        ("DELETE", "/api/announcements/x"),
    ):
        answer = server.http.request(method, path, headers=key(who), json={"command": "standby"})
        assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_ERROR"), path
    assert server.http.get("/api/status", headers=key(who)).status_code == 200


# --- status and announcements ---------------------------------------------------------------------------


def test_status_and_health(server: Server) -> None:
    before = server.http.get("/api/status").json()
    assert set(before) == {
        "online_nodes", "total_nodes", "total_requests", "current_concurrent", "avg_response_time_ms",
        "engines", "announcements",
    }  # fmt: skip
    assert before["engines"]["pair"] == {"total": 2, "online": 2, "ready": 2}
    assert before["online_nodes"] == before["total_nodes"] == len(nodes(server))
    server.http.post("/api/synthesize", json={"text": "Hello.", "voice_id": "anna"})
    after = server.http.get("/api/status").json()
    assert after["total_requests"] == before["total_requests"] + 1
    assert after["avg_response_time_ms"] > 0
    health = server.http.get("/api/health")
    assert (health.status_code, health.json()["status"]) == (200, "healthy")
    assert health.json()["components"]["registry"]["ready_nodes"] >= 2


def test_announcements(server: Server) -> None:
    body = {"type": "maintenance", "title": "Tonight", "message": "Down <b>at</b> noon."}
    made = server.http.post("/api/announcements", json=body)
    assert made.status_code == 200, made.text
    announcement_id = made.json()["id"]
    (found,) = server.http.get("/api/announcements").json()["announcements"]
    assert body.items() <= found.items()
    assert set(found) == {"id", "type", "title", "message", "created_at", "expires_at"}
    assert server.http.get("/api/status").json()["announcements"] == [found]
    assert (server.store / "announcements" / f"{announcement_id}.json").exists()
    for wrong in ({"type": "party"}, {"title": ""}, {"id": "../x"}, {"expires_at": "soon"}):
        assert server.http.post("/api/announcements", json={**body, **wrong}).status_code == 400
    assert server.http.delete(f"/api/announcements/{announcement_id}").json() == {"success": True}
    assert server.http.delete(f"/api/announcements/{announcement_id}").status_code == 404
    assert server.http.delete("/api/announcements/..%2frecords").status_code == 404


# --- /ws ------------------------------------------------------------------------------------------------


@contextmanager
def watching(server: Server, who: str | None = None, **options: Any) -> Iterator[ClientConnection]:
    url = server.url.replace("http", "ws") + "/ws"
    with connect(url, additional_headers=key(who) if who else None, open_timeout=30, **options) as socket:
        yield socket


def hear(socket: ClientConnection, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The next message that is wanted."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        message: dict[str, Any] = json.loads(socket.recv(timeout=30))
        if wanted(message):
            return message
    raise AssertionError("it never came")


def of_type(kind: str) -> Callable[[dict[str, Any]], bool]:
    return lambda message: message["type"] == kind


def test_ws_tells_the_status_and_answers(server: Server) -> None:
    with watching(server) as socket:
        first = json.loads(socket.recv(timeout=30))
        assert set(first) == {"type", "data", "timestamp"}
        assert first["type"] == "system_status"
        assert first["data"]["engines"]["tone"]["ready"] == 1
        for junk in ("", "{", "[]", "7", '{"type": 7}', '{"type": "dance"}', "x" * 100_000):
            socket.send(junk)
        socket.send(b"\x00\xff")
        socket.send('{"type": "ping"}')
        assert hear(socket, of_type("pong")) == {"type": "pong"}
        socket.send('{"type": "get_status"}')
        hear(socket, of_type("system_status"))
        # And by itself.
        hear(socket, of_type("system_status"))


def test_ws_tells_of_announcements_and_of_ones_own_batches(server: Server) -> None:
    with watching(server, "studio") as mine, watching(server, "rival") as other:
        for socket in (mine, other):
            hear(socket, of_type("system_status"))
        # The first look is what later ones are compared with.
        time.sleep(1.5)
        made = server.http.post("/api/announcements", json={"title": "News", "message": "Of today."})
        assert hear(mine, of_type("announcement"))["data"]["title"] == "News"
        server.http.delete(f"/api/announcements/{made.json()['id']}")
        body = {"texts": ["One sentence. " * 6] * 6, "voice_id": "anna", "engine": "slow"}
        headers = {**key("studio"), "x-request-id": "batch-to-watch"}
        answer = server.http.post("/api/batch_synthesize", json=body, headers=headers)
        assert answer.json()["succeeded"] == 6

        def ended(message: dict[str, Any]) -> bool:
            return bool(message["type"] == "request_complete" and message["data"]["succeeded"] == 6)

        assert hear(mine, ended)["data"]["request_id"] == "batch-to-watch"
        # Whoever did not ask hears nothing of it.
        heard = [json.loads(other.recv(timeout=30)) for _ in range(4)]
        assert not [message for message in heard if message["type"].startswith("request_")]


def test_ws_needs_a_known_caller_and_a_page_of_this_server(server: Server) -> None:
    with pytest.raises(InvalidStatus) as refused, watching(server, origin="https://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    protocols = ["v3", f"openai-insecure-api-key.{SECRETS['reader']}"]
    with watching(server, origin="https://evil.example", subprotocols=protocols) as socket:
        assert socket.subprotocol == "v3"
        hear(socket, of_type("system_status"))


def test_ws_lets_go_of_clients_that_leave(server: Server) -> None:
    for _ in range(20):
        with watching(server) as socket:
            socket.recv(timeout=30)
            # Without a goodbye.
            socket.socket.shutdown(SHUT_RDWR)
    with watching(server) as socket:
        hear(socket, of_type("system_status"))

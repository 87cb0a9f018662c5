"""Live sessions through the whole graph, behind Serve's default proxy."""

from __future__ import annotations

import json
from socket import SHUT_RDWR
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from serve_app.ingress.data_url import encoded_length
from tests.graph.clients import shows
from tests.graph.conftest import Server, activity, eventually, router_activity
from tests.graph.test_one_shot import data_url
from tests.speech import noisy_tone, wav_bytes

WORDS = "The birch canoe slid on the smooth planks. It is easy to tell the depth of a well. And then it ends."


def open_session(server: Server, **options: Any) -> ClientConnection:
    """A socket, not configured yet."""
    url = server.url.replace("http://", "ws://")
    socket: ClientConnection = connect(f"{url}/v1/audio/speech/stream", max_size=None, **options)
    return socket


def tell(socket: ClientConnection, kind: str, **fields: object) -> None:
    """Send one message."""
    socket.send(json.dumps({"type": kind, **fields}))


def configure(socket: ClientConnection, **fields: object) -> None:
    """The first message."""
    tell(socket, "session.config", **{"model": "tone", "voice": "anna", "seed": 5, **fields})


def receive(socket: ClientConnection, until: str) -> tuple[list[dict[str, Any]], bytes]:
    """Messages up to one of a kind, and the audio between them."""
    messages: list[dict[str, Any]] = []
    audio = b""
    while not messages or messages[-1]["type"] != until:
        frame = socket.recv(timeout=30)
        if isinstance(frame, bytes):
            audio += frame
        else:
            messages.append(json.loads(frame))
    return messages, audio


@shows("vLLM-Omni's clients", "live WebSocket")
def test_the_first_sentence_is_heard_before_the_last_is_written(server: Server) -> None:
    with open_session(server) as socket:
        configure(socket)
        letters = iter(WORDS)
        for letter in letters:
            tell(socket, "input.text", text=letter)
            if letter == "d":  # of "slid", and of "and": the first sentence is complete by then
                break
        for letter in letters:
            tell(socket, "input.text", text=letter)
            if letter == "w":  # of "well"
                break
        first, audio = receive(socket, "audio.done")
        for letter in letters:
            tell(socket, "input.text", text=letter)
        tell(socket, "input.done")
        rest, more = receive(socket, "session.done")
    starts = [message for message in first + rest if message["type"] == "audio.start"]
    assert "".join(start["sentence_text"] for start in starts) == WORDS
    assert len(starts) > 1
    expected = b""
    for start in starts:
        body = {"model": "tone", "voice": "anna", "response_format": "pcm"}
        body |= {"input": start["sentence_text"], "seed": start["seed"]}
        expected += server.http.post("/v1/audio/speech", json=body).content
    assert audio + more == expected
    assert {start["engine"] for start in starts} == {"tone"}


def test_interrupt_frees_the_engine_and_the_session_goes_on(server: Server) -> None:
    with open_session(server) as socket:
        configure(socket, model="slow")
        tell(socket, "input.text", text="word " * 40)
        tell(socket, "input.done")
        receive(socket, "audio.start")
        assert activity("slow")[0].rows_open == 1
        tell(socket, "input.interrupt")
        receive(socket, "session.interrupted")
        eventually(lambda: activity("slow")[0].rows_open == 0)
        tell(socket, "input.text", text="Hi.")
        tell(socket, "input.done")
        messages, audio = receive(socket, "session.done")
    assert messages[0]["sentence_text"] == "Hi."
    assert messages[-1] == {"type": "session.done", "utterance_index": 1, "total_sentences": 1}
    assert audio


@pytest.mark.parametrize("politely", [True, False], ids=["close frame", "cut"])
def test_leaving_frees_the_engine(server: Server, politely: bool) -> None:
    with open_session(server) as socket:
        configure(socket, model="slow")
        tell(socket, "input.text", text="word " * 40)
        tell(socket, "input.done")
        receive(socket, "audio.start")
        assert activity("slow")[0].rows_open == 1
        if not politely:
            socket.socket.shutdown(SHUT_RDWR)
    eventually(lambda: activity("slow")[0].rows_open == 0)
    eventually(lambda: router_activity().requests == 0)


def test_a_session_speaks_like_a_recording_of_its_own(server: Server) -> None:
    url = data_url(wav_bytes(noisy_tone(310.0)))
    with open_session(server) as socket:
        configure(socket, ref_audio=url, voice=None, response_format="flac")
        tell(socket, "input.text", text="Hello there.")
        tell(socket, "input.done")
        messages, audio = receive(socket, "session.done")
    body = {"model": "tone", "input": "Hello there.", "seed": 5, "ref_audio": url, "response_format": "flac"}
    assert audio == server.http.post("/v1/audio/speech", json=body).content
    assert messages[0]["voice_id"] is None


def test_errors_of_the_router_end_the_turn_only(server: Server) -> None:
    with open_session(server) as socket:
        configure(socket, voice="nobody")
        tell(socket, "input.text", text="Hi.")
        tell(socket, "input.done")
        messages, _ = receive(socket, "session.done")
        assert messages[0]["error"]["code"] == "voice_not_found"
        assert messages[-1]["failed"] is True
        configure(socket)
        tell(socket, "input.text", text="Hi.")
        tell(socket, "input.done")
        receive(socket, "session.done")
        tell(socket, "session.close")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=30)
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1000


def test_pages_of_other_origins_are_kept_out(server: Server) -> None:
    with pytest.raises(InvalidStatus) as refused:
        open_session(server, origin="https://evil.example")
    assert refused.value.response.status_code == 403
    with open_session(server, origin=server.url) as socket:
        configure(socket)


def test_a_huge_frame_ends_its_session_only(server: Server) -> None:
    with open_session(server) as socket:
        tell(socket, "session.config", voice="anna", ref_audio="A" * (encoded_length(10 << 20) + (2 << 20)))
        with pytest.raises(ConnectionClosed):
            receive(socket, "nothing else")
    assert httpx.get(f"{server.url}/health/ready").status_code == 200

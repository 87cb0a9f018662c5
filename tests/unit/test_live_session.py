"""Live sessions over a router that is a stand-in: order, limits of time and size, and what ends what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import numpy as np
import pytest
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from serve_app.config import Settings
from serve_app.errors import EngineFailed, RateLimited, ShuttingDown, TooManyAtOnce, VoiceCloneError
from serve_app.handle import RouterHandle
from serve_app.ingress.api import build_api
from serve_app.protocol import AudioFrame, SpeechRequest, SpeechStarted

PATH = "ws://localhost/v1/audio/speech/stream"
RATE_HZ = 24_000
#: Samples of one character.
PER_CHARACTER = 240


class Studio:
    """In the place of the router: speaks each character as a constant, if it may."""

    def __init__(
        self,
        *,
        at_once: int = 9,
        refuse: Callable[[str], bool] = lambda _: False,
        refusal: VoiceCloneError | None = None,
        pause_s: float = 0,
    ) -> None:
        self.requests: list[SpeechRequest] = []
        self.open = 0
        self.most_open = 0
        self._pause_s = pause_s
        self._at_once = at_once
        self._refuse = refuse
        self._refusal = refusal or RateLimited("Too much. Wait.")

    async def speak(self, request: SpeechRequest) -> AsyncGenerator[SpeechStarted | AudioFrame, None]:
        self.requests.append(request)
        if self.open >= self._at_once:
            raise TooManyAtOnce("One at a time. Wait.")
        if self._refuse(request.text):
            raise self._refusal
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield SpeechStarted("tone", "voice_1", "en", RATE_HZ, request.seed or 0, 1)
            for _ in request.text:
                if "[hold]" in request.text:
                    await asyncio.Event().wait()
                yield AudioFrame(np.full(PER_CHARACTER, 0.25, np.float32))
                await asyncio.sleep(self._pause_s)
            if "[fail]" in request.text:
                raise EngineFailed("The engine failed. Try again.")
        finally:
            self.open -= 1


def client(studio: Studio, **settings: Any) -> TestClient:
    """A client of an API over ``studio``."""
    return TestClient(build_api(cast(RouterHandle, studio), Settings.model_validate(settings)))


def configure(socket: WebSocketTestSession, **fields: object) -> None:
    """The first message."""
    socket.send_json({"type": "session.config", "voice": "anna", **fields})


def write(socket: WebSocketTestSession, *pieces: str, done: bool = True) -> None:
    """A turn."""
    for piece in pieces:
        socket.send_json({"type": "input.text", "text": piece})
    if done:
        socket.send_json({"type": "input.done"})


def receive(socket: WebSocketTestSession, until: str = "session.done") -> tuple[list[dict[str, Any]], bytes]:
    """Messages up to one of a kind, and the audio between them."""
    messages: list[dict[str, Any]] = []
    audio = b""
    while not messages or messages[-1]["type"] != until:
        frame = socket.receive()
        if frame["type"] == "websocket.close":
            raise WebSocketDisconnect(frame["code"])
        if frame.get("bytes"):
            audio += frame["bytes"]
        else:
            messages.append(json.loads(frame["text"]))
    return messages, audio


def test_a_turn_is_spoken_while_it_is_written() -> None:
    studio = Studio()
    with client(studio).websocket_connect(PATH) as socket:
        configure(socket, seed=5)
        write(socket, "One", " sen", "tence. A", "nd", done=False)
        first, audio = receive(socket, "audio.done")
        assert first[0]["sentence_text"] == "One sentence. "
        assert (first[0]["format"], first[0]["sample_rate"], first[0]["channels"]) == ("pcm", RATE_HZ, 1)
        assert len(audio) == 2 * PER_CHARACTER * len("One sentence. ")
        assert first[-1]["duration_ms"] == 10 * len("One sentence. ")
        write(socket, " another.")
        rest, audio = receive(socket)
    assert rest[0]["sentence_text"] == "And another."
    assert rest[0]["sentence_index"] == 1
    assert rest[-1] == {"type": "session.done", "utterance_index": 0, "total_sentences": 2}
    assert len(audio) == 2 * PER_CHARACTER * len("And another.")
    one, two = studio.requests
    assert (one.text, two.text) == ("One sentence. ", "And another.")
    # What speaks the first stretch speaks them all.
    assert (two.model, two.language, two.fallback_engines) == ("tone", "en", ())
    assert one.seed == 5 != two.seed


def test_what_is_completed_while_two_are_under_way_is_one_request() -> None:
    studio = Studio()
    with client(studio).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, *(f"Sentence {number} it is. " for number in range(40)))
        messages, _ = receive(socket)
    texts = [request.text for request in studio.requests]
    assert "".join(texts) == "".join(f"Sentence {number} it is. " for number in range(40))
    assert studio.most_open <= 2
    starts = [message for message in messages if message["type"] == "audio.start"]
    assert [start["sentence_text"] for start in starts] == texts
    assert [start["sentence_index"] for start in starts] == list(range(len(texts)))


def test_turns_come_in_order_and_each_has_an_end() -> None:
    with client(Studio()).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, "First.")
        configure(socket, response_format="wav")
        write(socket)
        write(socket, "Third.")
        pcm, _ = receive(socket)
        empty, _ = receive(socket)
        wav, audio = receive(socket)
    assert [message["utterance_index"] for message in (pcm[-1], empty[-1], wav[-1])] == [0, 1, 2]
    assert empty == [{"type": "session.done", "utterance_index": 1, "total_sentences": 0}]
    assert wav[0]["format"] == "wav"
    assert audio.startswith(b"RIFF")


def test_flush_speaks_half_a_sentence() -> None:
    with client(Studio()).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, "Let me see", done=False)
        socket.send_json({"type": "input.flush"})
        messages, _ = receive(socket, "audio.done")
        assert messages[0]["sentence_text"] == "Let me see"
        write(socket, ", here it is.")
        messages, _ = receive(socket)
    assert messages[0]["sentence_text"] == ", here it is."


def test_interrupt_silences_everything_that_was_written() -> None:
    studio = Studio()
    with client(studio).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, "This is spoken. And then [hold] here")
        write(socket, "This waits behind it.")
        receive(socket, "audio.start")
        socket.send_json({"type": "input.interrupt"})
        messages, _ = receive(socket, "session.interrupted")
        assert messages[-1]["utterance_index"] == 1
        assert studio.open == 0
        write(socket, "Now this.")
        messages, audio = receive(socket)
    assert messages[0]["sentence_text"] == "Now this."
    assert messages[-1]["utterance_index"] == 2
    assert len(audio) == 2 * PER_CHARACTER * len("Now this.")
    assert "This waits behind it." not in [request.text for request in studio.requests]


def test_leaving_stops_what_is_spoken() -> None:
    studio = Studio()
    with client(studio) as http:
        with http.websocket_connect(PATH) as socket:
            configure(socket)
            write(socket, "It goes [hold] on.")
            receive(socket, "audio.start")
            assert studio.open == 1
        assert studio.open == 0
        with http.websocket_connect(PATH) as socket:
            configure(socket)
            write(socket, "It goes [hold] on.")
            receive(socket, "audio.start")
            socket.send_json({"type": "session.close"})
            with pytest.raises(WebSocketDisconnect) as closed:
                receive(socket)
        assert closed.value.code == 1000
        assert studio.open == 0


def test_an_error_ends_its_turn_and_not_the_session() -> None:
    studio = Studio()
    with client(studio).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, "Good. ", "But [fail] here. ", "Never said.")
        messages, _ = receive(socket)
        (error,) = [message for message in messages if message["type"] == "error"]
        assert error["error"]["code"] == "engine_error"
        assert error["utterance_index"] == 0
        assert messages[-1]["failed"] is True
        write(socket, "Good again.")
        messages, _ = receive(socket)
    assert messages[-1] == {"type": "session.done", "utterance_index": 1, "total_sentences": 1}
    assert studio.open == 0


def test_a_server_that_stops_ends_the_session() -> None:
    studio = Studio(refuse=lambda _: True, refusal=ShuttingDown("The server is shutting down."))
    with client(studio).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, "Hi.")
        ((error,), _) = receive(socket, "error")
        assert error["error"]["code"] == "shutting_down"
        with pytest.raises(WebSocketDisconnect) as closed:
            receive(socket)
    assert closed.value.code == 1012


def test_what_is_written_to_a_turn_that_failed_is_dropped() -> None:
    studio = Studio(refuse=lambda text: "One" in text)
    with client(studio).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, "One sentence. Another", done=False)
        messages, _ = receive(socket)
        assert messages[0]["error"]["code"] == "rate_limit_exceeded"
        write(socket, " one. ", "More.")
        write(socket, "The next turn.")
        messages, _ = receive(socket)
    assert messages[0]["sentence_text"] == "The next turn."


def test_a_caller_with_one_place_speaks_whole_turns() -> None:
    """The next stretch is refused while the first is heard, and asked for again after it."""
    studio = Studio(at_once=1)
    with client(studio).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, *(f"Sentence {number} it is. " for number in range(9)))
        messages, audio = receive(socket)
    assert not [message for message in messages if message["type"] == "error"]
    assert len(audio) == 2 * PER_CHARACTER * sum(len(f"Sentence {n} it is. ") for n in range(9))


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        ("{", "invalid_json", None),
        ("[]", "invalid_json", None),
        ("{}", "invalid_value", "type"),
        ('{"type": "sing"}', "invalid_value", "type"),
        ('{"type": "input.text"}', "missing_field", "text"),
        ('{"type": "input.text", "text": 5}', "invalid_value", "text"),
        ('{"type": "session.config"}', "missing_field", "voice"),
        ('{"type": "session.config", "voice": "anna", "speed": 9}', "invalid_value", "speed"),
        ('{"type": "session.config", "ref_audio": "/etc/passwd"}', "feature_disabled", "ref_audio"),
        (
            '{"type": "session.config", "voice": "a", "response_format": "opus", "sample_rate": 22050}',
            "invalid_value",
            "sample_rate",
        ),
    ],
)
def test_an_unreadable_message_changes_nothing(raw: str, code: str, param: str | None) -> None:
    with client(Studio()).websocket_connect(PATH) as socket:
        configure(socket)
        socket.send_text(raw)
        ((error,), _) = receive(socket, "error")
        assert (error["error"]["code"], error["error"]["param"]) == (code, param)
        assert "passwd" not in json.dumps(error)
        socket.send_bytes(b"\x00")
        receive(socket, "error")
        write(socket, "He\ud800llo \x00.")
        messages, _ = receive(socket)
    assert messages[-1]["total_sentences"] == 1


def test_configuration_comes_first_and_between_turns() -> None:
    with client(Studio()).websocket_connect(PATH) as socket:
        socket.send_json({"type": "input.text", "text": "Hi."})
        ((error,), _) = receive(socket, "error")
        assert "session.config" in error["message"]
        configure(socket)
        write(socket, "Hi", done=False)
        configure(socket)
        ((error,), _) = receive(socket, "error")
        assert "input.done" in error["message"]


@pytest.mark.parametrize(
    ("settings", "messages", "code"),
    [
        ({"config_timeout_s": 0.05}, [], 1008),
        ({"idle_timeout_s": 0.05}, ["session.config"], 1008),
        ({"max_pending_chars": 50}, ["session.config", "x" * 51], 1009),
        ({}, ["session.config", "x" * (130 << 10)], 1009),
        ({}, ["session.config", "It goes [hold] on.", *["input.done"] * 100], 1009),
    ],
    ids=["no config", "idle", "too much text", "large frame", "too many turns"],
)
def test_limits_close_the_session(settings: dict[str, object], messages: list[str], code: int) -> None:
    with client(Studio(), live=settings).websocket_connect(PATH) as socket:
        for message in messages:
            if message == "session.config":
                configure(socket, split_granularity="none")
            elif message == "input.done":
                socket.send_json({"type": message})
            else:
                write(socket, message, done=False)
        with pytest.raises(WebSocketDisconnect) as closed:
            receive(socket, "nothing else")
    assert closed.value.code == code


def test_who_listens_is_not_idle() -> None:
    studio = Studio(pause_s=0.6)
    with client(studio, live={"idle_timeout_s": 0.5}).websocket_connect(PATH) as socket:
        configure(socket)
        write(socket, "ab")
        messages, _ = receive(socket)
    assert messages[-1]["total_sentences"] == 1


def test_sessions_are_counted() -> None:
    http = client(Studio(), live={"max_sessions": 1})
    with http.websocket_connect(PATH) as first:
        configure(first)
        with http.websocket_connect(PATH) as second, pytest.raises(WebSocketDisconnect) as closed:
            receive(second, "nothing else")
        assert closed.value.code == 1013
        write(first, "Still here.")
        receive(first)
    with http.websocket_connect(PATH) as third:
        configure(third)
        write(third, "Room again.")
        receive(third)


@pytest.mark.parametrize(
    ("origin", "allowed", "opens"),
    [
        (None, [], True),
        ("http://localhost", [], True),
        ("https://evil.example", [], False),
        ("null", [], False),
        ("http://localhost.evil.example", [], False),
        ("https://app.example", ["https://app.example"], True),
        ("http://app.example", ["https://app.example"], False),
        ("https://any.example", ["*"], True),
    ],
)
def test_pages_of_other_origins_are_kept_out(origin: str | None, allowed: list[str], opens: bool) -> None:
    http = client(Studio(), browsers={"allowed_origins": allowed})
    headers = {} if origin is None else {"origin": origin}
    if opens:
        with http.websocket_connect(PATH, headers=headers) as socket:
            configure(socket)
            write(socket, "Hi.")
            receive(socket)
    else:
        with pytest.raises(WebSocketDisconnect), http.websocket_connect(PATH, headers=headers):
            pass

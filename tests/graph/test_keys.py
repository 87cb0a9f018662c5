"""Keys on the served graph: whose voices are whose, what gets through the HTTP server, and what is logged."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import ray
from openai import NotFoundError, OpenAI, PermissionDeniedError

from serve_app.client import HttpClient
from serve_app.errors import VoiceNotFound
from tests.graph.conftest import SECRETS, Server, eventually
from tests.speech import noisy_tone, wav_bytes


def headers(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


def enrol(server: Server, who: str, name: str, pitch_hz: float = 150.0, **form: str) -> httpx.Response:
    sample = {"audio_sample": ("x.wav", wav_bytes(noisy_tone(pitch_hz)))}
    return server.http.post(
        "/v1/audio/voices", data={"name": name, **form}, files=sample, headers=headers(who)
    )


def speak(server: Server, who: str, voice: str) -> httpx.Response:
    body = {"model": "tone", "voice": voice, "input": "Same words.", "response_format": "pcm", "seed": 1}
    return server.http.post("/v1/audio/speech", json=body, headers=headers(who))


@contextmanager
def enrolled(server: Server, who: str, name: str, pitch_hz: float = 150.0) -> Iterator[str]:
    answer = enrol(server, who, name, pitch_hz)
    assert answer.status_code == 200, answer.text
    voice: str = answer.json()["id"]
    yield voice
    server.http.delete(f"/v1/audio/voices/{voice}", headers=headers("boss"))


def without_id(answer: httpx.Response) -> dict[str, Any]:
    problem: dict[str, Any] = answer.json()
    problem.pop("instance", None)
    return problem


def test_b25_a_voice_of_another_key_is_not_there(server: Server) -> None:
    absent = "voice_" + "0" * 26
    with enrolled(server, "studio", "the secret") as voice:
        assert speak(server, "studio", voice).status_code == 200
        for mine, other in ((voice, absent), ("the secret", "no such name")):
            for who in ("rival", "reader"):
                for path in ("/v1/audio/voices", "/api/voices"):
                    if who == "rival":
                        hidden = server.http.delete(f"{path}/{mine}", headers=headers(who))
                        never = server.http.delete(f"{path}/{other}", headers=headers(who))
                        assert hidden.status_code == never.status_code == 404
                        assert without_id(hidden) == without_id(never)
                hidden = server.http.get(f"/v1/audio/voices/{mine}", headers=headers(who))
                assert hidden.status_code == 404
                spoken, unspoken = speak(server, who, mine), speak(server, who, other)
                assert spoken.status_code == unspoken.status_code == 404
                assert without_id(spoken) == without_id(unspoken)
                old = {"text": "Hello.", "voice_id": mine}
                answer = server.http.post("/api/synthesize", json=old, headers=headers(who))
                assert (answer.status_code, answer.json()["code"]) == (404, "VOICE_NOT_FOUND")
                for page in ("/v1/audio/voices?limit=1000", "/api/voices"):
                    assert voice not in server.http.get(page, headers=headers(who)).text
        assert voice in server.http.get("/v1/audio/voices?limit=1000", headers=headers("studio")).text
        assert voice in server.http.get("/v1/audio/voices?limit=1000", headers=headers("boss")).text
        assert speak(server, "boss", voice).status_code == 200


def test_two_keys_can_have_a_voice_of_one_name(server: Server) -> None:
    with enrolled(server, "studio", "twin", 120.0) as one, enrolled(server, "rival", "twin", 300.0) as two:
        assert one != two
        assert speak(server, "studio", "twin").content != speak(server, "rival", "twin").content
        renewed = enrol(server, "rival", "twin", 200.0, replace="true")
        assert renewed.json()["id"] == two
        assert speak(server, "studio", "twin").headers["x-voice-id"] == one
        taken = enrol(server, "studio", "twin")
        assert taken.status_code == 409
        assert two not in taken.text


def test_a_shared_voice_is_for_all_to_use_and_for_none_to_delete(server: Server) -> None:
    assert speak(server, "rival", "anna").status_code == 200
    # An alias of the configuration leads to it too.
    assert speak(server, "rival", "alloy").status_code == 200
    refused = server.http.delete("/v1/audio/voices/anna", headers=headers("rival"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "voice_forbidden")


def test_scopes_and_the_sdk_of_openai(server: Server) -> None:
    assert enrol(server, "reader", "not allowed").status_code == 403
    sdk = OpenAI(base_url=f"{server.url}/v1", api_key=SECRETS["reader"], max_retries=0)
    with pytest.raises(NotFoundError):
        sdk.audio.speech.create(model="tone", voice="nobody", input="Hi.")
    with pytest.raises(PermissionDeniedError) as refused:
        sdk.post("/audio/voices", cast_to=object)
    assert refused.value.code == "forbidden"


def test_the_client_sends_its_key(server: Server) -> None:
    with HttpClient(server.url, api_key=SECRETS["studio"]) as mine, HttpClient(server.url) as plain:
        voice = mine.enrol("of the client", wav_bytes(noisy_tone(160.0)))
        assert voice in mine.voices()
        with HttpClient(server.url, api_key=SECRETS["rival"]) as other:
            assert voice not in other.voices()
            with pytest.raises(VoiceNotFound):
                other.speak("Hello.", voice.id, engine="tone")
        # Callers without a key are admins of this graph.
        plain.delete_voice(voice.id)
        assert voice not in mine.voices()


def raw(server: Server, data: bytes) -> bytes:
    """What the HTTP server says to these bytes."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as connection:
        connection.settimeout(30)
        heard = b""
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                heard += part
        except ConnectionError:
            pass  # it has heard enough
        return heard


@pytest.mark.parametrize(
    "head",
    [
        b"Authorization: Bearer " + b"x" * (1 << 20) + b"\r\n",
        b"".join(b"X-H%d: 1\r\n" % number for number in range(10_000)),
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 0x10\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"X-Fold: a\r\n b\r\n",
        b"X-Nul: a\0b\r\n",
        b"X Space : a\r\n",
    ],
    ids=["huge key", "many headers", "te and cl", "two cl", "negative", "hex", "te", "fold", "nul", "space"],
)
def test_c12_odd_heads_are_refused_and_the_server_goes_on(server: Server, head: bytes) -> None:
    smuggled = b"GET /v1/audio/voices/smuggled HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    request = b"POST /v1/audio/speech HTTP/1.1\r\nHost: here\r\nConnection: close\r\n" + head + b"\r\n"
    heard = raw(server, request + b"0\r\n\r\n" + smuggled)
    answers = heard.count(b"HTTP/1.1 ")
    assert answers <= 1, heard
    assert not heard or heard.startswith(b"HTTP/1.1 4"), heard[:200]
    assert b"Traceback" not in heard
    assert server.http.get("/health/ready").status_code == 200


def logs() -> dict[Path, str]:
    """Every log of this Ray."""
    node: Any = ray._private.worker._global_node
    folder = Path(node.get_logs_dir_path())
    return {path: path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}


def test_c7_texts_and_keys_are_not_logged(server: Server) -> None:
    text = "Xylophone quartzes vex nobody"
    transcript = "Jackdaws loved my big sphinx"
    request_id = "the-one-to-look-for"
    studio = {**headers("studio"), "x-request-id": request_id}
    with enrolled(server, "studio", "quiet name") as voice:
        sample = {"audio_sample": ("x.wav", wav_bytes(noisy_tone(150.0)))}
        form = {"name": "quiet name", "ref_text": transcript, "consent": f"{transcript} I agree."}
        form["replace"] = "true"
        server.http.post("/v1/audio/voices", data=form, files=sample, headers=studio).raise_for_status()
        good = {"model": "tone", "voice": voice, "input": f"{text}."}
        for body, status in (
            (good, 200),
            ({**good, "stream": False}, 200),
            ({**good, "input": f"{text} [fail]."}, 500),
            ({**good, "voice": text}, 404),
            ({**good, "language": text[:30]}, 400),
            ({**good, "speed": text}, 400),
            ({**good, "engine_options": {"wobble": text}}, 400),
            ({**good, "model": text}, 404),
        ):
            assert server.http.post("/v1/audio/speech", json=body, headers=studio).status_code == status
        server.http.post("/v1/audio/speech", content=json.dumps(text)[:-1], headers=studio)
        old = {"text": text, "voice_id": voice}
        assert server.http.post("/api/synthesize", json=old, headers=studio).status_code == 200
        wrong = {"authorization": "Bearer vc_mistyped_secret", "x-request-id": request_id}
        server.http.post("/v1/audio/speech", json=good, headers=wrong)
    # Served requests are logged, with a delay: by then whatever else there is to log is there too.
    eventually(lambda: sum(log.count(request_id) for log in logs().values()) >= 11)
    for path, log in logs().items():
        for secret in (text, transcript, "vc_mistyped", *SECRETS.values()):
            assert secret not in log, f"{secret} in {path}"


def test_no_answer_holds_a_traceback_or_a_path(server: Server) -> None:
    for body in (
        {"model": "tone", "voice": "anna", "input": "please [fail]"},
        {"model": "tone", "voice": "anna", "input": "please [nan]"},
        {"model": "mute", "voice": "anna", "input": "Hello.", "fallback_engines": []},
    ):
        answer = server.http.post("/v1/audio/speech", json=body)
        assert answer.status_code >= 500
        for trace in ("Traceback", ".py", "/serve_app", "/home", "ray::"):
            assert trace not in answer.text

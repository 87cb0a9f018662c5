"""Bad input gets a clear error, in the shape its client reads, and the server goes on."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.graph.conftest import Server

GOOD = {"model": "tone", "voice": "anna", "input": "Hello."}

CASES: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("missing input", {"model": "tone", "voice": "anna"}, 400, "missing_field", "input"),
    ("missing voice", {"model": "tone", "input": "Hello."}, 400, "missing_field", "voice"),
    ("empty input", {**GOOD, "input": ""}, 400, "input_empty", "input"),
    ("blank input", {**GOOD, "input": " \n\t"}, 400, "input_empty", "input"),
    ("punctuation only", {**GOOD, "input": "…!!"}, 400, "input_empty", "input"),
    ("emoji only", {**GOOD, "input": "🎉🎉"}, 400, "input_empty", "input"),
    ("number as input", {**GOOD, "input": 123}, 400, "invalid_value", "input"),
    ("list as voice", {**GOOD, "voice": []}, 400, "invalid_value", "voice"),
    ("word as speed", {**GOOD, "speed": "fast"}, 400, "invalid_value", "speed"),
    ("slow speed", {**GOOD, "speed": 0.24}, 400, "invalid_value", "speed"),
    ("fast speed", {**GOOD, "speed": 4.01}, 400, "invalid_value", "speed"),
    ("word as stream", {**GOOD, "stream": "yes"}, 400, "invalid_value", "stream"),
    ("unknown format", {**GOOD, "response_format": "mpeg"}, 400, "unsupported_format", "response_format"),
    ("unknown stream", {**GOOD, "stream_format": "ws"}, 400, "invalid_value", "stream_format"),
    (
        "events of a whole",
        {**GOOD, "stream_format": "sse", "stream": False},
        400,
        "conflicting_fields",
        "stream_format",
    ),
    ("words of nothing", {**GOOD, "ref_text": "Hello."}, 400, "conflicting_fields", "ref_text"),
    ("unknown model", {**GOOD, "model": "gpt-9"}, 404, "model_not_found", "model"),
    ("unknown voice", {**GOOD, "voice": "nobody"}, 404, "voice_not_found", None),
    ("path as voice", {**GOOD, "voice": "../../etc/passwd"}, 404, "voice_not_found", None),
    ("nul in voice", {**GOOD, "voice": "anna\x00"}, 404, "voice_not_found", None),
    ("foreign language", {**GOOD, "language": "tlh"}, 400, "unsupported_language", "language"),
    (
        "unknown option",
        {**GOOD, "engine_options": {"wobble": 1}},
        400,
        "unsupported_option",
        "engine_options",
    ),
    ("bad option value", {**GOOD, "engine_options": {"harmonics": 99}}, 400, "unsupported_option", None),
    ("too long", {**GOOD, "input": "a" * 4097}, 400, "input_too_long", "input"),
    ("sample rate", {**GOOD, "sample_rate": 1}, 400, "invalid_value", "sample_rate"),
    ("negative seed", {**GOOD, "seed": -1}, 400, "invalid_value", "seed"),
    *(
        (f"reference {url[:24]}", {**GOOD, "ref_audio": url}, status, code, "ref_audio")
        for url, status, code in (
            ("file:///etc/passwd", 400, "feature_disabled"),
            ("/etc/passwd", 400, "feature_disabled"),
            ("http://127.0.0.1:8265", 400, "feature_disabled"),
            ("http://169.254.169.254/latest", 400, "feature_disabled"),
            ("http://2130706433/", 400, "feature_disabled"),
            ("gopher://localhost", 400, "feature_disabled"),
            ("", 400, "feature_disabled"),
            ("data:audio/wav;base64", 400, "invalid_value"),
            ("data:audio/wav,abc", 400, "invalid_value"),
            ("data:audio/wav;base64,????", 400, "invalid_value"),
            ("data:text/html;base64,AAAA", 400, "invalid_value"),
            ("data:audio/wav;base64,", 415, "unsupported_media_type"),
            ("data:audio/wav;base64,PGh0bWw+", 415, "unsupported_media_type"),
            ("data:;base64,UklGRiQAAABXQVZF", 422, "audio_undecodable"),
        )
    ),
]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_field(server: Server, body: dict[str, Any], status: int, code: str, param: str | None) -> None:
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["error"]["code"] == code
    assert problem["error"]["param"] == param or param is None
    assert problem["detail"] == problem["error"]["message"]
    assert problem["instance"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert "passwd" not in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe"])
def test_body_that_is_no_json_object(server: Server, body: bytes) -> None:
    answer = server.http.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e309"])
def test_speed_that_is_no_number(server: Server, number: str) -> None:
    body = f'{{"voice": "anna", "input": "Hello.", "speed": {number}}}'
    answer = server.http.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_lone_surrogates_and_control_characters_are_dropped(server: Server) -> None:
    body = b'{"model": "tone", "voice": "anna", "input": "He\\ud800llo \\u0000 \\ufeff there."}'
    answer = server.http.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200


@pytest.mark.parametrize("megabytes", [2, 16])
def test_huge_text_is_refused(server: Server, megabytes: int) -> None:
    """Also where the body could be that large for a recording in it."""
    answer = server.http.post("/v1/audio/speech", json={**GOOD, "input": "a" * (megabytes << 20)})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_huge_recording_is_refused(server: Server) -> None:
    url = "data:audio/wav;base64," + "A" * (14 << 20)
    answer = server.http.post("/v1/audio/speech", json={**GOOD, "ref_audio": url})
    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "ref_audio"


@pytest.mark.parametrize(
    "text",
    ["." * 4096, "a." * 2000, "(" * 4000 + "a", "1" * 4096, "1," * 2000, "word" * 1000, "あ" * 4000],
    ids=["dots", "initials", "parentheses", "digits", "commas", "one word", "no spaces"],
)
def test_hostile_text_is_spoken_or_refused(server: Server, text: str) -> None:
    answer = server.http.post("/v1/audio/speech", json={**GOOD, "input": text, "response_format": "pcm"})
    assert answer.status_code in (200, 400), answer.text


def test_unspeakable_stretch_inside_a_text_is_passed_over(server: Server) -> None:
    text = "Hello there. " + "." * 700 + " Goodbye."
    answer = server.http.post("/v1/audio/speech", json={**GOOD, "input": text, "response_format": "pcm"})
    assert answer.status_code == 200
    assert len(answer.content) > 24_000


def test_huge_body_without_a_length_is_refused_as_it_comes(server: Server) -> None:
    parts = (b"a" * 65536 for _ in range(256))
    headers = {"content-type": "application/json"}
    answer = server.http.post("/v1/audio/speech", content=parts, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_sdk_raises_its_own_types(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        server.openai.audio.speech.create(model="tone", voice="nobody", input="Hi.")
    assert missing.value.code == "voice_not_found"
    assert "GET /v1/audio/voices" in missing.value.message
    with pytest.raises(openai.BadRequestError) as empty:
        server.openai.audio.speech.create(model="tone", voice="anna", input="…")
    assert empty.value.param == "input"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/audio/speech", 405, "method_not_allowed"),
        ("POST", "/v1/audio/nonsense", 404, "route_not_found"),
        ("GET", "/", 404, "route_not_found"),
    ],
)
def test_wrong_routes_have_our_shape(server: Server, method: str, path: str, status: int, code: str) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


def test_retrying_is_discouraged_where_it_cannot_help(server: Server) -> None:
    answer = server.http.post("/v1/audio/speech", json={**GOOD, "voice": "nobody"})
    assert answer.headers["x-should-retry"] == "false"


def test_bad_requests_leave_no_trace(server: Server) -> None:
    for _, body, status, _, _ in CASES:
        assert server.http.post("/v1/audio/speech", json=body).status_code == status
    good = server.http.post("/v1/audio/speech", json=GOOD)
    assert good.status_code == 200
    assert httpx.get(f"{server.url}/health/ready").status_code == 200

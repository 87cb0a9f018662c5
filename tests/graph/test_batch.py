"""Several texts in one request: each succeeds or fails by itself."""

from __future__ import annotations

import base64
from typing import Any

from tests.graph.conftest import Server
from tests.speech import read_audio

DEFAULTS = {"model": "tone", "voice": "anna", "response_format": "wav", "seed": 3}


def batch(server: Server, *items: dict[str, Any], **fields: object) -> dict[str, Any]:
    """The answer to a batch."""
    answer = server.http.post("/v1/audio/speech/batch", json={**DEFAULTS, **fields, "items": items})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_items_are_what_single_requests_would_be(server: Server) -> None:
    texts = [f"Text number {n}, {'la ' * n}." for n in range(12)]
    answer = batch(server, *({"input": text} for text in texts))
    assert (answer["total"], answer["succeeded"], answer["failed"]) == (12, 12, 0)
    for index, (text, result) in enumerate(zip(texts, answer["results"], strict=True)):
        single = server.http.post("/v1/audio/speech", json={**DEFAULTS, "input": text, "stream": False})
        assert (result["index"], result["status"]) == (index, "success")
        assert base64.b64decode(result["audio_data"]) == single.content
        assert result["media_type"] == "audio/wav"
        assert result["usage"]["input_tokens"] == len(text)


def test_an_item_may_differ_from_the_defaults(server: Server) -> None:
    answer = batch(
        server,
        {"input": "Fast.", "speed": 4.0},
        {"input": "Fast."},
        {"input": "As MP3.", "response_format": "mp3", "speaker": "alloy"},
    )
    fast, slow, mp3 = answer["results"]
    assert fast["duration_ms"] < slow["duration_ms"]
    assert mp3["media_type"] == "audio/mpeg"
    assert len(read_audio(base64.b64decode(mp3["audio_data"]))[0]) > 0


def test_an_item_may_ask_for_times(server: Server) -> None:
    first, second = batch(server, {"input": "One. Two.", "timestamps": "srt"}, {"input": "One."})["results"]
    assert [sentence["text"] for sentence in first["sentences"]] == ["One.", "Two."]
    assert first["sentences"][-1]["end_ms"] == first["duration_ms"]
    assert first["subtitles"].startswith("1\n00:00:00,000 --> ")
    assert "sentences" not in second


def test_a_bad_item_spoils_no_other(server: Server) -> None:
    answer = batch(
        server,
        {"input": "Good."},
        {"input": "please [fail]"},
        {"input": "Hi.", "voice": "nobody"},
        {"input": "Hi.", "speed": 9},
        {"text": "no input"},
        {"input": "Good again."},
    )
    codes = [result["error"] and result["error"]["code"] for result in answer["results"]]
    expected = [None, "engine_error", "voice_not_found", "invalid_value", "missing_field", None]
    assert codes == expected
    assert [result["status"] == "success" for result in answer["results"]] == [code is None for code in codes]
    assert (answer["succeeded"], answer["failed"]) == (2, 4)


def test_too_much_is_refused_as_a_whole(server: Server) -> None:
    for items, code in (
        ([], "invalid_value"),
        ([{"input": "a"}] * 33, "invalid_value"),
        ([{"input": "a" * 4000}] * 9, "input_too_long"),
        ("text", "invalid_value"),
    ):
        answer = server.http.post("/v1/audio/speech/batch", json={**DEFAULTS, "items": items})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == code
        assert answer.json()["error"]["param"] == "items"

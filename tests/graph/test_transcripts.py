"""A voice without a transcript and an engine that needs one: it is heard, and corrected over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.judges import word_error_rate
from benchmarks.speakers import DEMO_SPEAKER, Clip, enrolment_clip, speaker
from tests.graph.conftest import Server
from tests.speech import wav_bytes


@pytest.fixture(scope="module")
def sonnet() -> Clip:
    return enrolment_clip(speaker(DEMO_SPEAKER))


@pytest.fixture(scope="module")
def reader(server: Server, sonnet: Clip) -> Iterator[dict[str, Any]]:
    """A voice that was heard when it was enrolled: the transcriber starts for it."""
    answer = enrol(server, "sonnet reader", sonnet, model="reading", language="en")
    assert answer.status_code == 200, answer.text
    yield answer.json()
    server.http.delete("/v1/audio/voices/sonnet reader")


def enrol(server: Server, name: str, clip: Clip, **form: str) -> Any:
    """POST a recording."""
    sample = {"audio_sample": ("x.wav", wav_bytes(clip.samples, clip.sample_rate_hz))}
    return server.http.post("/v1/audio/voices", data={"name": name, **form}, files=sample)


def pcm(server: Server, voice: str, model: str = "reading") -> bytes:
    """A fixed sentence by a voice."""
    body = {"model": model, "voice": voice, "input": "Same words.", "response_format": "pcm", "seed": 1}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_an_enrolled_reader_was_heard(server: Server, reader: dict[str, Any], sonnet: Clip) -> None:
    transcript = reader["transcript"]
    assert reader["has_transcript"]
    assert (transcript["source"], transcript["language"]) == ("heard", "en")
    assert 0.5 < transcript["confidence"] <= 1
    assert sonnet.transcript is not None
    assert word_error_rate(sonnet.transcript, transcript["text"]) < 0.15
    words = transcript["words"]
    assert words[0]["word"] == transcript["text"].split()[0]
    assert 0 <= words[0]["start"] < words[-1]["end"] <= reader["duration_s"] + 0.5
    assert server.http.get(f"/v1/audio/voices/{reader['id']}").json() == reader
    (listed,) = [
        voice for voice in server.http.get("/v1/audio/voices").json()["data"] if voice["id"] == reader["id"]
    ]
    assert listed["transcript"]["text"] == transcript["text"]
    assert "words" not in listed["transcript"]


def test_a_correction_is_heard_at_once_and_can_be_taken_back(server: Server, reader: dict[str, Any]) -> None:
    address = f"/v1/audio/voices/{reader['id']}"
    before, tone = pcm(server, reader["id"]), pcm(server, reader["id"], "tone")
    text = reader["transcript"]["text"].replace("fairest", "rarest")
    edited = server.http.patch(address, json={"transcript": text})
    assert edited.status_code == 200, edited.text
    assert edited.json()["transcript"]["text"] == text
    assert edited.json()["transcript"]["source"] == "edited"
    assert len(edited.json()["transcript"]["words"]) >= len(text.split())
    assert pcm(server, reader["id"]) != before
    # An engine that uses no transcript has nothing to compute again.
    assert pcm(server, reader["id"], "tone") == tone
    assert server.http.patch(address, json={"transcript": ""}).json() == reader
    assert pcm(server, reader["id"]) == before


def test_a_voice_enrolled_for_another_engine_is_heard_when_it_is_needed(
    server: Server, reader: dict[str, Any], sonnet: Clip
) -> None:
    first = enrol(server, "unheard", sonnet, model="tone", language="en").json()
    assert first["transcript"] is None
    assert not first["has_transcript"]
    # The same recording: the same words, and so the same sound.
    assert pcm(server, "unheard") == pcm(server, reader["id"])
    assert server.http.get("/v1/audio/voices/unheard").json()["transcript"]["source"] == "heard"
    server.http.delete("/v1/audio/voices/unheard")


def test_given_words_are_kept(server: Server, sonnet: Clip) -> None:
    voice = enrol(server, "given", sonnet, model="reading", language="en", ref_text=sonnet.transcript or "")
    transcript = voice.json()["transcript"]
    assert (transcript["text"], transcript["source"]) == (sonnet.transcript, "given")
    # 20 s are more than the engine uses: it is told when each word is said.
    assert len(transcript["words"]) == len((sonnet.transcript or "").split())
    server.http.delete("/v1/audio/voices/given")


def test_an_english_transcriber_wants_to_be_told_the_language(server: Server, sonnet: Clip) -> None:
    for form, code in (({}, "language_needed"), ({"language": "fr"}, "unsupported_language")):
        answer = enrol(server, "nobody", sonnet, model="reading", **form)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        assert answer.json()["error"]["param"] == "language"
    assert server.http.get("/v1/audio/voices/nobody").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "transcript"),
        ({"transcript": "x" * 2001}, 400, "transcript"),
        ({"transcript": "x", "language": "no such"}, 400, "language"),
        ({"transcript": "x", "name": "y"}, 400, "name"),
    ],
)
def test_a_correction_is_checked(server: Server, body: dict[str, str], status: int, param: str) -> None:
    answer = server.http.patch("/v1/audio/voices/anna", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_only_a_voice_can_be_corrected(server: Server) -> None:
    answer = server.http.patch("/v1/audio/voices/nobody", json={"transcript": "Hello."})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "voice_not_found")

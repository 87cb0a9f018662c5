"""Sentence times over HTTP, against the audio they are about."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import av
import numpy as np
import pytest

from tests.graph.conftest import Server
from tests.speech import read_audio

SENTENCES = ["The first is short.", "The second one is quite a bit longer than that.", "And a third."]
BODY = {"model": "pair", "voice": "anna", "input": " ".join(SENTENCES), "seed": 2}


def timed(server: Server, **fields: object) -> dict[str, Any]:
    """The JSON answer."""
    answer = server.http.post("/v1/audio/speech", json={**BODY, "response_format": "wav", **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-engine"] == "pair"
    body: dict[str, Any] = answer.json()
    return body


def test_each_sentence_is_where_it_is_said_to_be(server: Server) -> None:
    answer = timed(server, timestamps="json")
    audio = base64.b64decode(answer["audio"])
    whole = server.http.post("/v1/audio/speech", json={**BODY, "response_format": "wav", "stream": False})
    assert audio == whole.content
    samples, rate_hz = read_audio(audio)
    assert [sentence["text"] for sentence in answer["sentences"]] == SENTENCES
    assert answer["sentences"][0]["start_ms"] == 0
    assert answer["sentences"][-1]["end_ms"] == answer["duration_ms"] == round(1000 * len(samples) / rate_hz)
    for index, sentence in enumerate(answer["sentences"]):
        part = samples[sentence["start_ms"] * rate_hz // 1000 : sentence["end_ms"] * rate_hz // 1000]
        text = SENTENCES[index] + " " * (index < 2)
        alone = {**BODY, "input": text, "seed": 2 + index, "response_format": "wav", "stream": False}
        spoken, _ = read_audio(server.http.post("/v1/audio/speech", json=alone).content)
        np.testing.assert_array_equal(part, spoken)
    assert answer["subtitles"] is None


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_are_read_by_a_player(server: Server, form: str) -> None:
    answer = timed(server, timestamps=form)
    with av.open(io.BytesIO(answer["subtitles"].encode()), "r", format=form.replace("vtt", "webvtt")) as file:
        cues = [
            (bytes(packet).decode(), round(float(packet.pts * packet.time_base) * 1000))
            for packet in file.demux()
            if packet.size and packet.pts is not None and packet.time_base is not None
        ]
    assert cues == [(sentence["text"], sentence["start_ms"]) for sentence in answer["sentences"]]


def test_events_tell_sentences_in_their_place(server: Server) -> None:
    body = {**BODY, "response_format": "pcm", "stream_format": "sse", "timestamps": "json"}
    lines = server.http.post("/v1/audio/speech", json=body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    told = [event for event in events if event["type"] == "speech.audio.sentence"]
    expected = timed(server, timestamps="json")["sentences"]
    assert [{name: event[name] for name in ("text", "start_ms", "end_ms")} for event in told] == expected
    heard_ms = 0.0
    for event in events:
        if event["type"] == "speech.audio.delta":
            heard_ms += len(base64.b64decode(event["audio"])) / 48
        elif event["type"] == "speech.audio.sentence":
            assert heard_ms >= event["end_ms"] - 1
    assert events[-1]["type"] == "speech.audio.done"


def test_conflicts_are_refused(server: Server) -> None:
    answer = server.http.post("/v1/audio/speech", json={**BODY, "stream_format": "sse", "timestamps": "srt"})
    assert answer.json()["error"]["code"] == "conflicting_fields"
    answer = server.http.post("/v1/audio/speech", json={**BODY, "timestamps": "words"})
    assert answer.json()["error"]["param"] == "timestamps"

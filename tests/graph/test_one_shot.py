"""Speaking like a recording that comes with the request, and is gone after it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from tests.graph.conftest import Server
from tests.speech import noisy_tone, wav_bytes

TEXT = "The words of a guest."


def data_url(audio: bytes, media_type: str = "audio/wav") -> str:
    """As clients write a recording into JSON."""
    return f"data:{media_type};base64,{base64.b64encode(audio).decode()}"


def speak(server: Server, **fields: object) -> bytes:
    """Samples of a speech, as bytes."""
    body = {"model": "tone", "input": TEXT, "response_format": "pcm", "seed": 1, **fields}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200, answer.text
    return answer.content


def stored(folder: Path) -> set[Path]:
    """Everything in the voice store."""
    return set(folder.rglob("*"))


@pytest.mark.parametrize("media_type", ["audio/wav", "", "AUDIO/X-WAV", "application/octet-stream"])
def test_sounds_as_if_the_recording_were_enrolled(server: Server, media_type: str) -> None:
    guest = wav_bytes(noisy_tone(310.0))
    once = speak(server, ref_audio=data_url(guest, media_type), ref_text="la la")
    sample = {"audio_sample": ("x.wav", guest)}
    voice = server.http.post("/v1/audio/voices", data={"name": "guest"}, files=sample).json()
    enrolled = speak(server, voice=voice["id"])
    server.http.delete(f"/v1/audio/voices/{voice['id']}")
    assert once == enrolled != speak(server, voice="anna")


def test_half_a_character_in_its_words_is_refused(server: Server) -> None:
    url = data_url(wav_bytes(noisy_tone(310.0)))
    body = json.dumps({"model": "tone", "input": TEXT, "ref_audio": url, "ref_text": "la \ud800 la"})
    headers = {"content-type": "application/json"}
    answer = server.http.post("/v1/audio/speech", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "ref_text")


def test_leaves_nothing_in_the_store(server: Server) -> None:
    voices = server.http.get("/v1/audio/voices").json()
    before = stored(server.store)
    body = {"model": "tone", "input": TEXT, "ref_audio": data_url(wav_bytes(noisy_tone(205.0)))}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200
    assert "x-voice-id" not in answer.headers
    assert stored(server.store) == before
    assert server.http.get("/v1/audio/voices").json() == voices


def test_the_recording_decides_and_the_voice_is_named_as_ignored(server: Server) -> None:
    url = data_url(wav_bytes(noisy_tone(310.0)))
    # The SDK cannot leave the voice out.
    answer = server.openai.audio.speech.with_raw_response.create(
        model="tone",
        voice="anna",
        input=TEXT,
        response_format="pcm",
        extra_body={"ref_audio": url, "seed": 1},
    )
    assert answer.headers["x-ignored-fields"] == "voice"
    assert answer.content == speak(server, ref_audio=url)


@pytest.mark.parametrize(
    ("audio", "status", "code"),
    [
        (wav_bytes(np.zeros(48_000, np.float32)), 422, "no_speech_detected"),
        (wav_bytes(noisy_tone(200.0, 0.3)), 422, "audio_too_short"),
        (wav_bytes(noisy_tone(200.0, 31.0, 16_000), 16_000), 422, "audio_too_long"),
    ],
    ids=["silence", "short", "long"],
)
def test_passes_the_guards_of_an_upload(server: Server, audio: bytes, status: int, code: str) -> None:
    body = {"model": "tone", "voice": "anna", "input": TEXT, "ref_audio": data_url(audio)}
    answer = server.http.post("/v1/audio/speech", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["param"] == "ref_audio"

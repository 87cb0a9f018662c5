"""Voices that come with an engine, in dialects whose requests do not name an engine."""

from __future__ import annotations

from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from serve_app.config import Settings
from serve_app.errors import InputEmpty
from serve_app.handle import RouterHandle
from serve_app.ingress.api import build_api
from serve_app.protocol import SpeechRequest
from serve_app.voices.voice import BuiltInVoice

ENGINES: dict[str, Any] = {"tone": {}, "mosaic": {}}


class Router:
    """Has one voice, of an engine that is not the default, and writes down what it is asked."""

    def __init__(self) -> None:
        self.requests: list[SpeechRequest] = []

    async def all_voices(self, _: object) -> list[BuiltInVoice]:
        return [BuiltInVoice("mosaic", "Ana B.")]

    def speak(self, request: SpeechRequest) -> Any:
        self.requests.append(request)
        raise InputEmpty("Heard.")


@pytest.mark.parametrize("dialect", ["elevenlabs", "xtts"])
def test_such_a_voice_is_listed_and_chooses_its_engine(dialect: str) -> None:
    router = Router()
    settings = Settings.model_validate({"engines": ENGINES})
    http = TestClient(build_api(cast(RouterHandle, router), settings), base_url="http://localhost")
    if dialect == "elevenlabs":
        (voice,) = http.get("/v1/voices").json()["voices"]
        for model in ({}, {"model_id": "eleven_flash_v2_5"}, {"model_id": "tone"}):
            http.post(f"/v1/text-to-speech/{voice['voice_id']}", json={"text": "Hi.", **model})
        http.post("/v1/text-to-speech/anna: me", json={"text": "Hi."})
        assert [request.model for request in router.requests] == ["mosaic", "mosaic", "tone", None]
    else:
        (voice,) = http.get("/speakers").json()
        for speaker in (voice["voice_id"], "anna.wav"):
            http.post("/tts_to_audio/", json={"text": "Hi.", "speaker_wav": speaker, "language": "en"})
        assert [request.model for request in router.requests] == ["mosaic", None]
        assert router.requests[1].voice == "anna"
    assert voice["name"] == "Ana B."
    assert router.requests[0].voice == voice["voice_id"] == "mosaic:Ana B."


def test_v3_lists_it_with_its_engine() -> None:
    settings = Settings.model_validate({"engines": ENGINES})
    http = TestClient(build_api(cast(RouterHandle, Router()), settings), base_url="http://localhost")
    (voice,) = http.get("/api/voices").json()["voices"]
    assert (voice["voice_id"], voice["engine"]) == ("mosaic:Ana B.", "mosaic")

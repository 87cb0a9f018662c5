"""The dialect of xtts-api-server, as SillyTavern's "XTTSv2" speaks it.

Its server took the path of a file for a voice, and settings that held for everybody. Here ``speaker_wav`` is
the id, name or alias of an enrolled voice (with or without ``.wav``), and ``POST /set_tts_settings``, which
SillyTavern sends at every move of a slider, is answered and changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from serve_app.audio.encode import AudioFormat
from serve_app.config import Settings
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.ingress.speech import speech_response
from serve_app.protocol import Priority, SpeechRequest
from serve_app.voices.voice import BuiltInVoice

Speaker = Annotated[str, Field(min_length=1, max_length=204)]
Language = Annotated[str | None, Field(max_length=35)]


class ToAudioBody(BaseModel):
    """Body of ``POST /tts_to_audio/``; what else is sent (``save_path``) is ignored."""

    text: str
    speaker_wav: Speaker
    language: Language = None


def routes(router: RouterHandle, callers: Callers, settings: Settings) -> APIRouter:
    """The dialect over ``router``. Its clients write some paths with a slash at the end."""
    api = APIRouter(tags=["XTTS server"])

    async def speak(
        text: str, speaker_wav: str, language: str | None, request: Request, *, stream: bool
    ) -> Response:
        caller = callers.caller(request.scope)
        voice = speaker_wav.removesuffix(".wav")
        engine = BuiltInVoice.engine_in(voice)
        return await speech_response(
            router,
            SpeechRequest(
                text=text,
                voice=voice,
                # A voice that comes with an engine speaks with no other.
                model=engine if engine in settings.engines else None,
                language=None if language in ("", "auto") else language,
                request_id=request.state.request_id,
                caller=caller,
                priority=callers.priority(caller, Priority.INTERACTIVE),
            ),
            AudioFormat.WAV,
            sample_rate_hz=None,
            stream=stream,
            headers={},
        )

    @api.post("/tts_to_audio/", response_class=Response)
    @api.post("/tts_to_audio", response_class=Response, include_in_schema=False)
    async def tts_to_audio(body: ToAudioBody, request: Request) -> Response:
        """Speak a text; the whole WAV in one body."""
        return await speak(body.text, body.speaker_wav, body.language, request, stream=False)

    @api.get("/tts_stream/", response_class=Response)
    @api.get("/tts_stream", response_class=Response, include_in_schema=False)
    async def tts_stream(
        request: Request,
        text: str,
        speaker_wav: Annotated[str, Query(min_length=1, max_length=204)],
        language: Annotated[str | None, Query(max_length=35)] = None,
    ) -> Response:
        """Speak a text; WAV while it is spoken, for an audio element of a page."""
        return await speak(text, speaker_wav, language, request, stream=True)

    @api.get("/speakers")
    async def speakers(request: Request) -> list[dict[str, str]]:
        """All voices."""
        voices = await router.all_voices(callers.caller(request.scope))
        return [{"name": voice.name, "voice_id": voice.id, "preview_url": ""} for voice in voices]

    @api.get("/speakers_list")
    async def speakers_list(request: Request) -> list[str]:
        """Names of all voices."""
        return [voice.name for voice in await router.all_voices(callers.caller(request.scope))]

    @api.get("/languages")
    async def languages() -> dict[str, dict[str, str]]:
        """What the engines that run now speak, by code."""
        facts = [engine for engine in (await router.models()).values() if engine is not None]
        return {"languages": {code: code for engine in facts for code in engine.languages}}

    @api.post("/set_tts_settings")
    async def set_tts_settings(sliders: dict[str, Any]) -> dict[str, str]:
        """Changes nothing: one client's sliders are not everybody's."""
        return {"message": "Settings are those of the server; a request may set its own elsewhere."}

    return api

"""The v3 dialect: the ``/api/*`` routes of the gateway this system replaces.

Same fields, real status codes. Two defaults differ because the old ones did harm: without ``language`` the
text's own language is found (the old default made every text Chinese), and ``pitch``, which was accepted and
ignored, is refused unless it is 1.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import BaseModel, Field
from starlette.responses import Response
from ulid import ULID

from serve_app.audio.encode import AudioFormat
from serve_app.errors import UnsupportedOption
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.ingress.speech import speech_response
from serve_app.protocol import EnrolRequest, Priority, SpeechRequest
from serve_app.voices.voice import Voice


class SynthesizeBody(BaseModel):
    """Body of ``POST /api/synthesize``."""

    text: str = Field(min_length=1, max_length=5000)
    voice_id: str = Field(min_length=1, max_length=200)
    engine: str | None = None
    language: str | None = Field(default=None, min_length=2, max_length=35)
    output_format: AudioFormat = AudioFormat.WAV
    speed: float = Field(default=1.0, ge=0.5, le=2.0, allow_inf_nan=False)
    pitch: float = Field(default=1.0, ge=0.5, le=2.0, allow_inf_nan=False)


def routes(router: RouterHandle, callers: Callers) -> APIRouter:
    """Synthesis, enrolment and the voice list of v3."""
    api = APIRouter(prefix="/api", tags=["v3"])

    @api.post("/synthesize", response_class=Response)
    async def synthesize(body: SynthesizeBody, request: Request) -> Response:
        """Speak a text; the whole audio in one body."""
        if body.pitch != 1.0:
            raise UnsupportedOption(
                "No engine changes the pitch of a voice: leave 'pitch' at 1.", param="pitch"
            )
        caller = callers.caller(request.scope)
        return await speech_response(
            router,
            SpeechRequest(
                text=body.text,
                voice=body.voice_id,
                model=body.engine,
                language=body.language,
                speed=body.speed,
                request_id=request.state.request_id,
                caller=caller,
                priority=callers.priority(caller, Priority.INTERACTIVE),
            ),
            body.output_format,
            sample_rate_hz=None,
            stream=False,
            headers={},
        )

    @api.post("/extract_voice")
    async def extract_voice(
        request: Request,
        audio: Annotated[UploadFile, File()],
        voice_id: Annotated[str, Form(max_length=100)] = "",
        voice_name: Annotated[str, Form(max_length=100)] = "",
        reference_text: Annotated[str, Form(max_length=2000)] = "",
        engine: Annotated[str | None, Form(max_length=100)] = None,
    ) -> dict[str, Any]:
        """Enrol a voice. A ``voice_id`` of the client becomes its name, and is found by it as before."""
        voice = await router.enrol(
            EnrolRequest(
                name=voice_id or voice_name or f"voice {ULID()}",
                audio=await audio.read(),
                transcript=reference_text,
                model=engine,
                # The old gateway overwrote a voice that was extracted again under the same id.
                replace=bool(voice_id),
                request_id=request.state.request_id,
                caller=callers.caller(request.scope),
            )
        )
        return {
            "success": True,
            "message": "Voice extracted.",
            "voice_id": voice.id,
            "voice_name": voice_name or voice.name,
            "engine": engine,
        }

    @api.get("/voices")
    async def list_voices(request: Request) -> dict[str, Any]:
        """All voices."""
        caller = callers.caller(request.scope)
        voices: list[Voice] = []
        after: str | None = None
        while True:
            page = await router.voices(caller, 1000, after)
            voices.extend(page.voices)
            if not page.has_more:
                return {"success": True, "voices": [_voice_info(voice) for voice in voices]}
            after = page.voices[-1].id

    @api.delete("/voices/{voice_id}")
    async def delete_voice(voice_id: str, request: Request) -> dict[str, Any]:
        """Remove a voice."""
        await router.delete_voice(voice_id, callers.caller(request.scope))
        return {"success": True, "message": "Voice deleted."}

    return api


def _voice_info(voice: Voice) -> dict[str, Any]:
    return {
        "voice_id": voice.id,
        "name": voice.name,
        "engine": "any",
        "created_at": datetime.fromtimestamp(voice.created_at, UTC).isoformat(),
        "source_audio": "reference.flac",
        "metadata": {"duration_s": voice.duration_s, "language": voice.language},
    }

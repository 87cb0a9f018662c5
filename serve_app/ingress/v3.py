"""The v3 dialect: speech and voices under ``/api``, as the gateway had them that this system replaces.

Same fields, real status codes. Two defaults differ because the old ones did harm: without ``language`` the
text's own language is found (the old default made every text Chinese), and ``pitch``, which was accepted and
ignored, is refused unless it is 1.
"""

from __future__ import annotations

import asyncio
import base64
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import BaseModel, Field
from starlette.responses import Response
from ulid import ULID

from serve_app.audio.encode import AudioFormat
from serve_app.errors import InputTooLong, UnsupportedOption, VoiceCloneError
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.ingress.problems import v3_code
from serve_app.ingress.speech import speech_response
from serve_app.protocol import BatchProgress, EnrolRequest, Priority, SpeechRequest
from serve_app.voices.voice import BuiltInVoice, Voice

#: Texts of one batch that are spoken at once, and characters of all: 20 000 are half an hour of audio.
_AT_ONCE = 4
_MOST_BATCH_CHARS = 20_000

Text = Annotated[str, Field(min_length=1, max_length=5000)]


class _SpeechBody(BaseModel):
    """What is said about every speech."""

    voice_id: str = Field(min_length=1, max_length=200)
    engine: str | None = None
    language: str | None = Field(default=None, min_length=2, max_length=35)
    output_format: AudioFormat = AudioFormat.WAV
    speed: float = Field(default=1.0, ge=0.5, le=2.0, allow_inf_nan=False)
    pitch: float = Field(default=1.0, ge=0.5, le=2.0, allow_inf_nan=False)

    def refuse_pitch(self) -> None:
        """Raise ``UnsupportedOption`` if it is to be changed."""
        if self.pitch != 1.0:
            raise UnsupportedOption(
                "No engine changes the pitch of a voice: leave 'pitch' at 1.", param="pitch"
            )


class SynthesizeBody(_SpeechBody):
    """Body of ``POST /api/synthesize``."""

    text: Text


class BatchBody(_SpeechBody):
    """Body of ``POST /api/batch_synthesize``."""

    texts: list[Text] = Field(min_length=1, max_length=100)


def routes(router: RouterHandle, callers: Callers) -> APIRouter:
    """Synthesis, enrolment and the voice list of v3."""
    api = APIRouter(prefix="/api", tags=["v3"])

    @api.post("/synthesize", response_class=Response)
    async def synthesize(body: SynthesizeBody, request: Request) -> Response:
        """Speak a text; the whole audio in one body."""
        body.refuse_pitch()
        return await speak(body, body.text, request)

    async def speak(body: _SpeechBody, text: str, request: Request) -> Response:
        caller = callers.caller(request.scope)
        return await speech_response(
            router,
            SpeechRequest(
                text=text,
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

    @api.post("/batch_synthesize")
    async def batch_synthesize(body: BatchBody, request: Request) -> dict[str, Any]:
        """Speak several texts in one voice, each into an audio file of its own.

        What fails fails for its text alone; if everything does, the answer is the error of the first text.
        Its progress is told on ``/ws``, to the same caller.
        """
        body.refuse_pitch()
        characters = sum(map(len, body.texts))
        if characters > _MOST_BATCH_CHARS:
            raise InputTooLong(
                f"The texts have {characters} characters together; {_MOST_BATCH_CHARS} are allowed. "
                "Send them in several batches.",
                param="texts",
            )
        client = callers.caller(request.scope).client
        progress = BatchProgress(request.state.request_id, client, len(body.texts))
        gate = asyncio.Semaphore(_AT_ONCE)
        errors: dict[int, VoiceCloneError] = {}

        async def one(index: int, text: str) -> dict[str, Any]:
            nonlocal progress
            async with gate:
                try:
                    answer = await speak(body, text, request)
                except VoiceCloneError as error:
                    errors[index] = error
                    progress = replace(progress, failed=progress.failed + 1)
                    result = {"success": False, "error": error.message, "code": v3_code(error)}
                else:
                    progress = replace(progress, succeeded=progress.succeeded + 1)
                    result = {
                        "success": True,
                        "size": len(answer.body),
                        "audio": base64.b64encode(answer.body).decode(),
                        "media_type": answer.media_type,
                        "duration_ms": int(answer.headers["X-Audio-Duration-Ms"]),
                        "engine": answer.headers["X-Engine"],
                    }
            await report()
            return {"index": index, **result}

        async def report() -> None:
            # Nobody has to hear of it for the batch to go on.
            with suppress(VoiceCloneError):
                await router.report_batch(progress)

        await report()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, text)) for index, text in enumerate(body.texts)]
        if not progress.succeeded:
            raise errors[0]
        return {
            "success": not progress.failed,
            "message": f"{progress.succeeded} of {progress.total} texts were spoken.",
            "results": [task.result() for task in tasks],
            "total": progress.total,
            "succeeded": progress.succeeded,
            "failed": progress.failed,
        }

    @api.post("/extract_voice")
    async def extract_voice(
        request: Request,
        audio: Annotated[UploadFile, File()],
        voice_id: Annotated[str, Form(max_length=100)] = "",
        voice_name: Annotated[str, Form(max_length=100)] = "",
        reference_text: Annotated[str, Form(max_length=2000)] = "",
        consent: Annotated[str, Form(max_length=2000)] = "",
        engine: Annotated[str | None, Form(max_length=100)] = None,
    ) -> dict[str, Any]:
        """Enrol a voice. A ``voice_id`` of the client becomes its name, and is found by it as before."""
        voice = await router.enrol(
            EnrolRequest(
                name=voice_id or voice_name or f"voice {ULID()}",
                audio=await audio.read(),
                consent=consent,
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
            "engine": engine or "any",
        }

    @api.get("/voices")
    async def list_voices(request: Request) -> dict[str, Any]:
        """All voices."""
        voices = await router.all_voices(callers.caller(request.scope))
        return {"success": True, "voices": [_voice_info(voice) for voice in voices]}

    @api.delete("/voices/{voice_id}")
    async def delete_voice(voice_id: str, request: Request) -> dict[str, Any]:
        """Remove a voice."""
        await router.delete_voice(voice_id, callers.caller(request.scope))
        return {"success": True, "message": "Voice deleted."}

    return api


def _voice_info(voice: Voice | BuiltInVoice) -> dict[str, Any]:
    if isinstance(voice, BuiltInVoice):
        return {"voice_id": voice.id, "name": voice.name, "engine": voice.engine, "metadata": {}}
    return {
        "voice_id": voice.id,
        "name": voice.name,
        "engine": "any",
        "created_at": float(voice.created_at),
        "source_audio": "reference.flac",
        "metadata": {"duration_s": voice.duration_s, "language": voice.language},
    }

"""Voices over HTTP: ``/v1/audio/voices``, OpenAI's shapes plus the listing its SDK lacks."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Request, UploadFile

from serve_app.config import Settings
from serve_app.errors import UnsupportedOption
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.protocol import EnrolRequest
from serve_app.voices.voice import BuiltInVoice, Voice


def voice_object(voice: Voice | BuiltInVoice, settings: Settings) -> dict[str, Any]:
    """A voice as clients see it."""
    aliases = [alias for alias, target in settings.voices.aliases.items() if target in (voice.id, voice.name)]
    if isinstance(voice, BuiltInVoice):
        return {
            "object": "audio.voice",
            "id": voice.id,
            "voice_id": voice.id,
            "name": voice.name,
            "type": "built_in",
            # Required by OpenAI's type; nobody knows when it was recorded.
            "created_at": 0,
            "status": "ready",
            "engines": [voice.engine],
            "aliases": aliases,
            "model": voice.engine,
        }
    return {
        "object": "audio.voice",
        "id": voice.id,
        "voice_id": voice.id,
        "name": voice.name,
        "type": "audio_sample",
        "created_at": voice.created_at,
        "status": "ready",
        # A voice belongs to no engine: each makes its own conditioning of the recording.
        "engines": list(settings.engines),
        "aliases": aliases,
        "language": voice.language or None,
        "languages": [voice.language] if voice.language else [],
        "description": voice.description or None,
        "duration_s": round(voice.duration_s, 3),
        "sample_rate": voice.sample_rate_hz,
        "has_transcript": bool(voice.transcript),
        "consent": voice.consent.model_dump() if voice.consent else None,
        "warnings": list(voice.warnings),
    }


def routes(router: RouterHandle, callers: Callers, settings: Settings) -> APIRouter:
    """Enrol, list, show and delete voices."""
    api = APIRouter(prefix="/v1/audio/voices", tags=["voices"])

    @api.post("")
    async def enrol(
        request: Request,
        audio_sample: Annotated[UploadFile, File(description="1 to 30 s of one speaker.")],
        name: Annotated[str, Form(min_length=1, max_length=100)],
        consent: Annotated[
            str,
            Form(max_length=2000, description="The speaker's statement, or the id of a recorded consent."),
        ] = "",
        ref_text: Annotated[str, Form(max_length=2000, description="What is said in the sample.")] = "",
        language: Annotated[str, Form(max_length=35, description="BCP-47.")] = "",
        speaker_description: Annotated[str, Form(max_length=1000, description="Free text.")] = "",
        model: Annotated[str | None, Form(max_length=100)] = None,
        replace: Annotated[bool, Form(description="Replace a voice of this name.")] = False,
        kind: Annotated[str, Form(alias="type", description="'audio_sample' only.")] = "audio_sample",
    ) -> dict[str, Any]:
        """Make a voice of a recording."""
        if kind != "audio_sample":
            raise UnsupportedOption(
                "Voices are made of recordings only. Send type 'audio_sample' with 'audio_sample'.",
                param="type",
            )
        voice = await router.enrol(
            EnrolRequest(
                name=name,
                audio=await audio_sample.read(),
                consent=consent,
                transcript=ref_text,
                language=language,
                description=speaker_description,
                model=model,
                replace=replace,
                request_id=request.state.request_id,
                caller=callers.caller(request.scope),
            )
        )
        return voice_object(voice, settings)

    @api.get("")
    async def list_voices(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(max_length=200)] = None,
        legacy: Annotated[bool, Query(description="Only names under 'voices'.")] = False,
    ) -> dict[str, Any]:
        """Voices in order of enrolment, and behind them those that come with an engine."""
        page = await router.voices(limit=limit, after=after)
        found: list[Voice | BuiltInVoice] = [*page.voices, *page.built_in]
        voices = [voice_object(voice, settings) for voice in found]
        return {
            "object": "list",
            "data": voices,
            # Clients that predate OpenAI's list shape read this member: Open WebUI objects, others names.
            "voices": [voice["name"] for voice in voices] if legacy else voices,
            "first_id": voices[0]["id"] if voices else None,
            "last_id": voices[-1]["id"] if voices else None,
            "has_more": page.has_more,
        }

    @api.get("/{voice}")
    async def get_voice(voice: str) -> dict[str, Any]:
        """One voice by id, name or alias."""
        return voice_object(await router.voice(voice), settings)

    @api.delete("/{voice}")
    async def delete_voice(voice: str) -> dict[str, Any]:
        """Remove a voice and everything computed from it."""
        gone = await router.delete_voice(voice)
        return {"id": gone.id, "object": "audio.voice.deleted", "deleted": True}

    return api

"""Voices over HTTP: ``/v1/audio/voices``, OpenAI's shapes plus what its SDK lacks: lists, transcripts."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from serve_app.config import Settings
from serve_app.errors import UnsupportedOption
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.protocol import EnrolRequest
from serve_app.transcripts.transcript import Correction, Transcript
from serve_app.voices.voice import LANGUAGE_PATTERN, BuiltInVoice, Voice

_UNSURE = "The transcript was heard by a recogniser that is not sure of it. Read it and correct it."


class TranscriptBody(BaseModel):
    """Body of ``PATCH /v1/audio/voices/{voice}``."""

    model_config = ConfigDict(extra="forbid")

    transcript: str = Field(
        max_length=2000, description="What is said in the recording; empty takes an earlier correction back."
    )
    language: str = Field(
        default="", max_length=35, pattern=LANGUAGE_PATTERN, description="Its language, BCP-47."
    )


def voice_object(
    voice: Voice | BuiltInVoice, settings: Settings, *, with_words: bool = True
) -> dict[str, Any]:
    """A voice as clients see it. Without ``with_words`` the times of words, most of it, are left out."""
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
    transcript = None if voice.words is None else _transcript_object(voice.words, with_words)
    unsure = voice.words is not None and voice.words.is_unsure
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
        "has_transcript": transcript is not None,
        "transcript": transcript,
        "consent": voice.consent.model_dump() if voice.consent else None,
        "warnings": [*voice.warnings, *([_UNSURE] if unsure else [])],
    }


def _transcript_object(transcript: Transcript, with_words: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "text": transcript.text,
        "source": transcript.source,
        "language": transcript.language or None,
        "confidence": None if transcript.confidence is None else round(transcript.confidence, 3),
    }
    if with_words:
        shown["words"] = [
            {"word": word.text.strip(), "start": round(word.start_s, 2), "end": round(word.end_s, 2)}
            for word in transcript.words
        ]
    return shown


def routes(router: RouterHandle, callers: Callers, settings: Settings) -> APIRouter:
    """Enrol, list, show, correct and delete voices."""
    api = APIRouter(prefix="/v1/audio/voices", tags=["voices"])

    @api.post("")
    async def enrol(
        request: Request,
        audio_sample: Annotated[
            list[UploadFile], File(description="1 to 30 s of one speaker; several times if you have more.")
        ],
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
        """Make a voice of one or several recordings."""
        if kind != "audio_sample":
            raise UnsupportedOption(
                "Voices are made of recordings only. Send type 'audio_sample' with 'audio_sample'.",
                param="type",
            )
        first, *more = [await sample.read() for sample in audio_sample]
        voice = await router.enrol(
            EnrolRequest(
                name=name,
                audio=first,
                more_audio=tuple(more),
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
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(max_length=200)] = None,
        legacy: Annotated[bool, Query(description="Only names under 'voices'.")] = False,
    ) -> dict[str, Any]:
        """The caller's own voices and the shared ones in order of enrolment, then those of engines."""
        page = await router.voices(callers.caller(request.scope), limit, after)
        found: list[Voice | BuiltInVoice] = [*page.voices, *page.built_in]
        voices = [voice_object(voice, settings, with_words=False) for voice in found]
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
    async def get_voice(voice: str, request: Request) -> dict[str, Any]:
        """One voice by id, name or alias."""
        return voice_object(await router.voice(voice, callers.caller(request.scope)), settings)

    @api.patch("/{voice}")
    async def correct_transcript(voice: str, body: TranscriptBody, request: Request) -> dict[str, Any]:
        """Say what is said in the recording of a voice."""
        correction = Correction(text=body.transcript, language=body.language)
        caller = callers.caller(request.scope)
        return voice_object(await router.correct_transcript(voice, correction, caller), settings)

    @api.delete("/{voice}")
    async def delete_voice(voice: str, request: Request) -> dict[str, Any]:
        """Remove a voice and everything computed from it."""
        gone = await router.delete_voice(voice, callers.caller(request.scope))
        return {"id": gone, "object": "audio.voice.deleted", "deleted": True}

    return api

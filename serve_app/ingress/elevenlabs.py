"""The ElevenLabs dialect: ``/v1/text-to-speech/{voice_id}[/stream]`` and ``/v1/voices``.

Their fields and their error shape, ``{"detail": {"status", "message"}}``. What the served engines have no
equal for (stability, style, neighbouring texts, dictionaries …) is ignored and named in ``X-Ignored-Fields``;
of ``voice_settings`` only ``speed`` counts. Their models mean the default engine. ``ulaw_8000`` and
``alaw_8000`` are refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.responses import Response

from serve_app.audio.encode import AudioFormat
from serve_app.config import Settings
from serve_app.errors import ModelNotFound, UnsupportedFormat
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.ingress.speech import speech_response
from serve_app.ingress.speech_body import printable
from serve_app.protocol import EngineFacts, EnrolRequest, Priority, SpeechRequest
from serve_app.voices.voice import BuiltInVoice, Voice

_THEIR_MODELS = "eleven_"
_DEFAULT_OUTPUT = "mp3_44100_128"
_OUTPUT = re.compile(r"(?P<format>mp3|pcm|wav|opus)_(?P<rate>\d{4,5})(_(?P<kilobits>\d{2,3}))?")
_BIT_RATES = {"mp3": (32, 48, 64, 96, 128, 192), "opus": (32, 64, 96, 128, 192)}


class SpokenSettings(BaseModel):
    """``voice_settings``."""

    model_config = ConfigDict(extra="allow")

    speed: float | None = Field(default=None, ge=0.25, le=4.0, allow_inf_nan=False)


class TextToSpeechBody(BaseModel):
    """Body of a speech."""

    model_config = ConfigDict(extra="allow")

    text: str
    model_id: str | None = Field(default=None, max_length=200)
    language_code: str | None = Field(default=None, min_length=2, max_length=35)
    voice_settings: SpokenSettings | None = None
    seed: StrictInt | None = Field(default=None, ge=0, lt=2**63)

    @property
    def ignored_fields(self) -> list[str]:
        """Names of fields that change nothing."""
        mine = self.model_extra or {}
        settings = (self.voice_settings.model_extra or {}) if self.voice_settings else {}
        return printable([*mine, *(f"voice_settings.{name}" for name in settings)])


def routes(router: RouterHandle, callers: Callers, settings: Settings) -> APIRouter:
    """The dialect over ``router``."""
    api = APIRouter(tags=["ElevenLabs"])

    async def speak(
        voice_id: str, body: TextToSpeechBody, output_format: str, request: Request, *, stream: bool
    ) -> Response:
        audio_format, sample_rate_hz, bits_per_second = _output(output_format)
        caller = callers.caller(request.scope)
        speed = body.voice_settings.speed if body.voice_settings else None
        headers = {"X-Ignored-Fields": ", ".join(body.ignored_fields)} if body.ignored_fields else {}
        return await speech_response(
            router,
            SpeechRequest(
                text=body.text,
                voice=voice_id,
                model=_engine(body.model_id, voice_id, settings),
                language=body.language_code,
                speed=1.0 if speed is None else speed,
                seed=body.seed,
                request_id=request.state.request_id,
                caller=caller,
                priority=callers.priority(caller, Priority.INTERACTIVE),
            ),
            audio_format,
            sample_rate_hz=sample_rate_hz,
            bits_per_second=bits_per_second,
            stream=stream,
            headers=headers,
        )

    @api.post("/v1/text-to-speech/{voice_id}", response_class=Response)
    async def convert(
        voice_id: str, body: TextToSpeechBody, request: Request, output_format: str = _DEFAULT_OUTPUT
    ) -> Response:
        """Speak a text; the whole audio in one body."""
        return await speak(voice_id, body, output_format, request, stream=False)

    @api.post("/v1/text-to-speech/{voice_id}/stream", response_class=Response)
    async def stream(
        voice_id: str, body: TextToSpeechBody, request: Request, output_format: str = _DEFAULT_OUTPUT
    ) -> Response:
        """Speak a text; audio while it is spoken."""
        return await speak(voice_id, body, output_format, request, stream=True)

    @api.get("/v1/voices")
    async def list_voices(request: Request) -> dict[str, Any]:
        """All voices."""
        voices = await router.all_voices(callers.caller(request.scope))
        return {"voices": [_voice(voice) for voice in voices]}

    @api.get("/v2/voices")
    async def search_voices(
        request: Request,
        page_size: Annotated[int, Query(ge=1, le=100)] = 10,
        next_page_token: Annotated[str | None, Query(max_length=200)] = None,
        search: Annotated[str, Query(max_length=200)] = "",
    ) -> dict[str, Any]:
        """Voices whose name or description holds a text, in pages."""
        wanted = search.casefold()
        voices = map(_voice, await router.all_voices(callers.caller(request.scope)))
        found = [
            voice for voice in voices if wanted in f"{voice['name']}\n{voice['description'] or ''}".casefold()
        ]
        ids = [voice["voice_id"] for voice in found]
        # Of a voice that is gone meanwhile: from the beginning.
        rest = found[ids.index(next_page_token) + 1 :] if next_page_token in ids else found
        has_more = len(rest) > page_size
        return {
            "voices": rest[:page_size],
            "has_more": has_more,
            "total_count": len(found),
            "next_page_token": rest[page_size - 1]["voice_id"] if has_more else None,
        }

    @api.post("/v1/voices/add")
    async def add_voice(
        request: Request,
        name: Annotated[str, Form(min_length=1, max_length=100)],
        files: Annotated[list[UploadFile], File()],
        description: Annotated[str, Form(max_length=1000)] = "",
        consent: Annotated[str, Form(max_length=2000, description="Ours: statement or consent id.")] = "",
    ) -> dict[str, Any]:
        """Make a voice of one or several recordings."""
        first, *more = [await file.read() for file in files]
        voice = await router.enrol(
            EnrolRequest(
                name=name,
                audio=first,
                more_audio=tuple(more),
                consent=consent,
                description=description,
                request_id=request.state.request_id,
                caller=callers.caller(request.scope),
            )
        )
        return {"voice_id": voice.id, "requires_verification": False}

    @api.get("/v1/voices/{voice_id}")
    async def get_voice(voice_id: str, request: Request) -> dict[str, Any]:
        """One voice."""
        return _voice(await router.voice(voice_id, callers.caller(request.scope)))

    @api.delete("/v1/voices/{voice_id}")
    async def delete_voice(voice_id: str, request: Request) -> dict[str, str]:
        """Remove a voice."""
        await router.delete_voice(voice_id, callers.caller(request.scope))
        return {"status": "ok"}

    return api


def model_list(models: dict[str, EngineFacts | None]) -> list[dict[str, Any]]:
    """``GET /v1/models`` as their clients read it: a bare array."""
    return [
        {
            "model_id": name,
            "name": name,
            "description": facts.card.summary if facts else None,
            "can_do_text_to_speech": facts is not None,
            "can_do_voice_conversion": False,
            "can_be_finetuned": False,
            "can_use_style": False,
            "can_use_speaker_boost": False,
            "languages": [{"language_id": code, "name": code} for code in (facts.languages if facts else ())],
        }
        for name, facts in models.items()
    ]


def _engine(model_id: str | None, voice_id: str, settings: Settings) -> str | None:
    """The engine meant; None is the default. Raises ``ModelNotFound`` for what is neither ours nor theirs.

    One of their models says nothing about ours: then a voice that comes with an engine chooses that engine.
    """
    if model_id is not None and settings.served_engine(model_id) is not None:
        return model_id
    if model_id is None or model_id.startswith(_THEIR_MODELS):
        engine = BuiltInVoice.engine_in(voice_id)
        return engine if engine in settings.engines else None
    raise ModelNotFound(f"No such model. Served: {', '.join(settings.engines)}.", param="model_id")


def _output(name: str) -> tuple[AudioFormat, int, int | None]:
    """Format, rate in Hz, and bits per second if it has them, of ``mp3_44100_128`` and the like."""
    match = _OUTPUT.fullmatch(name)
    if match is not None:
        audio_format, rate_hz = AudioFormat(match["format"]), int(match["rate"])
        kilobits = int(match["kilobits"]) if match["kilobits"] else None
        fits = kilobits in _BIT_RATES.get(match["format"], (None,))
        if fits and rate_hz in audio_format.sample_rates_hz:
            return audio_format, rate_hz, None if kilobits is None else 1000 * kilobits
    raise UnsupportedFormat(
        "There is no such output_format here. Choose mp3_44100_128, pcm_24000, wav_24000, opus_48000_64 or a "
        "relative of theirs.",
        param="output_format",
    )


def _voice(voice: Voice | BuiltInVoice) -> dict[str, Any]:
    if isinstance(voice, BuiltInVoice):
        return {
            "voice_id": voice.id,
            "name": voice.name,
            "category": "premade",
            "labels": {},
            "description": f"Comes with engine {voice.engine} and needs it as model_id.",
            "preview_url": None,
            "is_owner": False,
        }
    return {
        "voice_id": voice.id,
        "name": voice.name,
        "category": "cloned",
        "labels": {"language": voice.language} if voice.language else {},
        "description": voice.description or None,
        "preview_url": None,
        "created_at_unix": voice.created_at,
    }

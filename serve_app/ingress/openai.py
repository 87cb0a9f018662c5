"""The OpenAI dialect: ``POST /v1/audio/speech`` and ``GET /v1/models``.

The body is OpenAI's with a few optional fields more; fields we do not know are ignored, as OpenAI's servers
do, and named in ``X-Ignored-Fields``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
from starlette.responses import Response

from serve_app.audio.encode import AudioFormat
from serve_app.errors import ModelNotFound, UnsupportedOption
from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.ingress.speech import speech_response
from serve_app.protocol import EngineFacts, Priority, SpeechRequest
from serve_app.transcripts.agreement import VerifyTerms


class VoiceReference(BaseModel):
    """OpenAI's object form of ``voice``."""

    id: str = Field(min_length=1, max_length=200)


class SpeechBody(BaseModel):
    """Body of ``POST /v1/audio/speech``."""

    model_config = ConfigDict(extra="allow")

    input: str = Field(description="The text to speak.")
    voice: Annotated[str, Field(min_length=1, max_length=200)] | VoiceReference = Field(
        description="Id, name or alias of an enrolled voice."
    )
    model: str | None = Field(default=None, description="Engine; the default engine if left out.")
    response_format: AudioFormat = Field(default=AudioFormat.MP3, description="Container of the audio.")
    speed: float = Field(default=1.0, ge=0.25, le=4.0, allow_inf_nan=False, description="Speaking rate.")
    instructions: str | None = Field(default=None, description="Ignored: no served engine takes any.")
    stream_format: Literal["audio", "sse"] = Field(default="audio", description="Only 'audio' is served.")
    stream: StrictBool = Field(
        default=True, description="Send audio while it is spoken; false sends it whole, with its length."
    )
    language: str | None = Field(
        default=None, min_length=2, max_length=35, description="BCP-47; found from the text if left out."
    )
    sample_rate: StrictInt | None = Field(
        default=None, ge=8_000, le=48_000, description="Rate of the answer in Hz."
    )
    seed: StrictInt | None = Field(default=None, ge=0, lt=2**63, description="Same seed, same samples.")
    fallback_engines: Annotated[list[str], Field(max_length=8)] | None = Field(
        default=None, description="Engines to try in order if the chosen one cannot begin."
    )
    priority: Priority = Field(
        default=Priority.INTERACTIVE, description="'bulk' lets everything interactive go first."
    )
    verify: VerifyTerms | Literal[False] | None = Field(
        default=None,
        description="Hear each utterance again before it is sent; as configured if left out.",
    )
    engine_options: dict[str, Any] = Field(default_factory=dict, description="The engine's own options.")

    @property
    def ignored_fields(self) -> list[str]:
        """Names of fields that change nothing."""
        unknown = [name for name in (self.model_extra or {}) if name.isidentifier() and name.isascii()]
        return [*sorted(unknown), *(["instructions"] if self.instructions else [])]


def routes(router: RouterHandle, callers: Callers) -> APIRouter:
    """The dialect over ``router``."""
    api = APIRouter(tags=["OpenAI"])

    @api.post("/v1/audio/speech", response_class=Response)
    async def create_speech(body: SpeechBody, request: Request) -> Response:
        """Speak a text in an enrolled voice."""
        if body.stream_format != "audio":
            raise UnsupportedOption("Only stream_format 'audio' is served here.", param="stream_format")
        headers = {"X-Ignored-Fields": ", ".join(body.ignored_fields)} if body.ignored_fields else {}
        caller = callers.caller(request.scope)
        return await speech_response(
            router,
            SpeechRequest(
                text=body.input,
                voice=body.voice if isinstance(body.voice, str) else body.voice.id,
                model=body.model,
                language=body.language,
                speed=body.speed,
                seed=body.seed,
                options=body.engine_options,
                verify=body.verify,
                fallback_engines=None if body.fallback_engines is None else tuple(body.fallback_engines),
                request_id=request.state.request_id,
                caller=caller,
                priority=callers.priority(caller, body.priority),
            ),
            body.response_format,
            sample_rate_hz=body.sample_rate,
            stream=body.stream,
            headers=headers,
        )

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The served engines."""
        models = await router.models()
        return {"object": "list", "data": [_model(name, facts) for name, facts in models.items()]}

    @api.get("/v1/models/{model}")
    async def get_model(model: str) -> dict[str, Any]:
        """One served engine."""
        models = await router.models()
        if model not in models:
            raise ModelNotFound(f"No such model. Served: {', '.join(models)}.", param="model")
        return _model(model, models[model])

    return api


def _model(name: str, facts: EngineFacts | None) -> dict[str, Any]:
    # `created` is required by OpenAI's type; an engine has no such date.
    entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "voice-clone-tts"}
    if facts is None:
        return {**entry, "status": "unavailable"}
    card = facts.card
    return {
        **entry,
        "status": "ready",
        "summary": card.summary,
        "languages": list(facts.languages),
        "sample_rate": card.sample_rate_hz,
        "streams": card.streams,
        "licence": {"code": card.code_licence, "weights": card.weights_licence},
        "engine_options": list(card.options),
    }

"""The OpenAI dialect: speech, one text or many at once, and the served models.

The fields are those of ``speech_body``. ``/v1/audio/speech/batch`` and ``/v1/audio/models`` are the shapes of
vLLM-Omni and of Open WebUI.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve_app.config import Settings
from serve_app.errors import BodyTooLarge, ModelNotFound
from serve_app.handle import RouterHandle
from serve_app.ingress import elevenlabs
from serve_app.ingress.batch import BatchBody, speak_batch
from serve_app.ingress.callers import Callers
from serve_app.ingress.speech import speech_response
from serve_app.ingress.speech_body import SpeechBody
from serve_app.protocol import EngineFacts


def routes(router: RouterHandle, callers: Callers, settings: Settings) -> APIRouter:
    """The dialect over ``router``."""
    api = APIRouter(tags=["OpenAI"])
    max_upload_bytes = settings.voices.reference.max_upload_bytes

    async def check_size(request: Request, body: SpeechBody | BatchBody) -> None:
        """Hold what is beside the recording to the limit of JSON bodies."""
        limit = settings.limits.max_body_bytes
        if len(await request.body()) - len(body.ref_audio or "") > limit:
            raise BodyTooLarge(f"The body is larger than {limit} bytes. Send less.")

    @api.post("/v1/audio/speech", response_class=Response)
    async def create_speech(body: SpeechBody, request: Request) -> Response:
        """Speak a text in an enrolled voice, or like the recording that comes with it."""
        await check_size(request, body)
        body.check()
        headers = {"X-Ignored-Fields": ", ".join(body.ignored_fields)} if body.ignored_fields else {}
        caller = callers.caller(request.scope)
        return await speech_response(
            router,
            body.request(
                body.input,
                request.state.request_id,
                caller,
                callers.priority(caller, body.priority),
                body.reference(max_upload_bytes),
            ),
            body.response_format,
            sample_rate_hz=body.sample_rate,
            stream=body.stream,
            headers=headers,
            events=body.stream_format == "sse",
            timestamps=body.timestamps,
        )

    @api.post("/v1/audio/speech/batch")
    async def create_speech_batch(body: BatchBody, request: Request) -> dict[str, Any]:
        """Speak several texts; each succeeds or fails by itself."""
        await check_size(request, body)
        caller = callers.caller(request.scope)
        return await speak_batch(
            router,
            body,
            settings,
            request_id=request.state.request_id,
            caller=caller,
            priority=callers.priority(caller, body.priority),
        )

    async def models() -> list[dict[str, Any]]:
        return [_model(name, facts) for name, facts in (await router.models()).items()]

    @api.get("/v1/models", response_model=None)
    async def list_models(request: Request) -> dict[str, Any] | list[dict[str, Any]]:
        """The served engines; to clients of ElevenLabs, whose path is the same, in their shape."""
        if "xi-api-key" in request.headers:
            return elevenlabs.model_list(await router.models())
        return {"object": "list", "data": await models()}

    @api.get("/v1/audio/models")
    async def list_audio_models() -> dict[str, Any]:
        """The served engines, also under the name that Open WebUI reads."""
        data = await models()
        return {"object": "list", "data": data, "models": data}

    @api.get("/v1/models/{model}")
    async def get_model(model: str) -> dict[str, Any]:
        """One served engine, by its name or another that requests may use."""
        facts = await router.models()
        name = settings.served_engine(model)
        if name is None:
            raise ModelNotFound(f"No such model. Served: {', '.join(facts)}.", param="model")
        return _model(name, facts[name])

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

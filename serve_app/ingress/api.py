"""build_api: all dialects on one FastAPI application."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from serve_app.config import Settings
from serve_app.handle import RouterHandle
from serve_app.ingress import (
    consents,
    elevenlabs,
    openai,
    ops,
    stream,
    v3,
    v3_operations,
    voices,
    xtts_server,
)
from serve_app.ingress.access import Access
from serve_app.ingress.browsers import SafeHeaders, add_cors
from serve_app.ingress.callers import Callers
from serve_app.ingress.data_url import encoded_length
from serve_app.ingress.fleet import Fleet
from serve_app.ingress.guards import BodyLimit, Disconnect, RequestId
from serve_app.ingress.problems import install_error_handlers


def build_api(router: RouterHandle, settings: Settings, fleet: Fleet | None = None) -> FastAPI:
    """The whole HTTP surface over ``router``; anything with RouterHandle's methods will do."""
    api = FastAPI(
        title="Voice Clone TTS",
        version=version("voice-clone-tts"),
        summary="A few seconds of a voice and some text: it speaks the text in that voice.",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    callers = Callers(settings.keys, settings.trusted_proxies)
    install_error_handlers(api)
    api.include_router(openai.routes(router, callers, settings))
    api.include_router(stream.routes(router, callers, settings))
    api.include_router(voices.routes(router, callers, settings))
    api.include_router(consents.routes(router, callers))
    api.include_router(elevenlabs.routes(router, callers, settings))
    api.include_router(xtts_server.routes(router, callers, settings))
    api.include_router(v3.routes(router, callers))
    api.include_router(v3_operations.routes(router, callers, fleet or Fleet(router, settings.engines)))
    api.include_router(ops.routes(router))
    max_upload_bytes = settings.voices.reference.max_upload_bytes
    # Added last runs first: the id is there before anything can be refused.
    api.add_middleware(
        BodyLimit,
        json_bytes=settings.limits.max_body_bytes,
        # The recording plus the other form fields and the multipart framing.
        form_bytes=max_upload_bytes + (64 << 10),
        with_recording=("/v1/audio/speech", "/v1/audio/speech/batch"),
        recording_bytes=encoded_length(max_upload_bytes),
    )
    api.add_middleware(
        Access,
        callers=callers,
        keys=settings.keys,
        anonymous=settings.anonymous,
        browsers=settings.browsers,
    )
    # A preflight carries no key, and a page has to be able to read a refusal.
    add_cors(api, settings.browsers)
    api.add_middleware(SafeHeaders)
    api.add_middleware(RequestId)
    api.add_middleware(Disconnect)
    return api

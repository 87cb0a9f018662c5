"""Errors on the wire: one internal error, the shape each dialect's clients read.

- OpenAI and everything else: ``application/problem+json`` (RFC 9457) with the OpenAI ``error`` member.
- v3 (``/api/``): ``{"success": false, "message", "error", "code"}`` with real status codes.
- ElevenLabs: ``{"detail": {"status", "message"}}``, ``status`` being our code.
- XTTS servers: ``{"detail": message}``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from serve_app.errors import (
    InternalError,
    InvalidJson,
    InvalidRequest,
    InvalidValue,
    JsonExpected,
    MethodNotAllowed,
    MissingField,
    ReachedLimit,
    RouteNotFound,
    UnsupportedFormat,
    VoiceCloneError,
)

logger = logging.getLogger("ray.serve")

#: Codes of the v3 gateway, by ours where they are finer than the status.
_V3_CODES = {
    "voice_not_found": "VOICE_NOT_FOUND",
    "model_not_found": "NODE_NOT_FOUND",
    "node_not_found": "NODE_NOT_FOUND",
    "engine_unavailable": "MODEL_NOT_LOADED",
}
_V3_CODES_BY_STATUS = {
    401: "AUTH_ERROR",
    403: "AUTH_ERROR",
    429: "RATE_LIMIT_EXCEEDED",
    503: "NO_AVAILABLE_NODE",
}


_ELEVENLABS = ("/v1/text-to-speech", "/v1/voices", "/v2/voices")
_XTTS_SERVER = ("/tts_to_audio", "/tts_stream", "/speakers", "/languages", "/set_tts_settings")


def route_path(scope: Scope) -> str:
    """The path below the place where the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def v3_code(error: VoiceCloneError) -> str:
    """The code of the v3 gateway for ``error``."""
    default = "ENGINE_ERROR" if error.status >= 500 else "INVALID_REQUEST"
    return _V3_CODES.get(error.code) or _V3_CODES_BY_STATUS.get(error.status, default)


def error_response(scope: Scope, error: VoiceCloneError) -> JSONResponse:
    """The response for ``error`` in the dialect of the path."""
    request_id = scope.get("state", {}).get("request_id", "")
    headers = {} if error.retryable else {"x-should-retry": "false"}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(_seconds(error.retry_after_s))
    if error.limit is not None:
        headers |= _limit_headers(error.limit, error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if route_path(scope).startswith("/api/"):
        body = {
            "success": False,
            "message": error.message,
            "error": error.message,
            "code": v3_code(error),
        }
        return JSONResponse(body, error.status, headers)
    if route_path(scope).startswith(_ELEVENLABS):
        detail = {"status": error.code, "message": error.message, "param": error.param}
        return JSONResponse({"detail": detail}, error.status, headers)
    if route_path(scope).startswith(_XTTS_SERVER):
        return JSONResponse({"detail": error.message}, error.status, headers)
    return JSONResponse(
        {
            "type": f"urn:voice-clone-tts:error:{error.code}",
            "title": error.title,
            "status": error.status,
            "detail": error.message,
            "instance": request_id,
            "error": error_member(error),
        },
        error.status,
        headers,
        media_type="application/problem+json",
    )


def error_member(error: VoiceCloneError) -> dict[str, str | None]:
    """What OpenAI's clients read, wherever an error is told to them."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def _seconds(seconds: float) -> int:
    """Whole seconds to wait. Never 0: a client that took it at its word would come back at once."""
    return max(1, math.ceil(seconds))


def _limit_headers(limit: ReachedLimit, retry_after_s: float | None) -> dict[str, str]:
    """``RateLimit``, ``RateLimit-Policy`` (draft-ietf-httpapi-ratelimit-headers-11), OpenAI's older ones."""
    policy = f'"{limit.policy}";q={limit.quota}'
    state = f'"{limit.policy}";r={limit.remaining}'
    legacy = {"limit": str(limit.quota), "remaining": str(limit.remaining)}
    if limit.window_s is None:
        policy += ';qu="concurrent-requests"'
    else:
        policy += f";w={round(limit.window_s)}"
    if limit.window_s is not None and retry_after_s is not None:
        state += f";t={_seconds(retry_after_s)}"
        legacy["reset"] = f"{_seconds(retry_after_s)}s"
    return {
        "RateLimit-Policy": policy,
        "RateLimit": state,
        **{f"x-ratelimit-{name}-{limit.counts}": value for name, value in legacy.items()},
    }


def install_error_handlers(api: FastAPI) -> None:
    """Give every way a request can fail one of our shapes."""

    @api.exception_handler(VoiceCloneError)
    async def ours(request: Request, error: VoiceCloneError) -> JSONResponse:
        return error_response(request.scope, error)

    @api.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = from_validation(error.errors())
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = sent == "application/json" or sent.endswith("+json")
        if isinstance(problem, InvalidJson) and sent and not is_json:
            problem = JsonExpected("The body has to be JSON. Send it with 'Content-Type: application/json'.")
        return error_response(request.scope, problem)

    @api.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(request.scope, _from_status(request, error.status_code))

    @api.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        logger.error("Defect while answering %s", request.scope["path"], exc_info=error)
        return error_response(
            request.scope,
            InternalError("Something went wrong on our side. The log has the details under the request id."),
        )


def _from_status(request: Request, status: int) -> VoiceCloneError:
    if status == 404:
        return RouteNotFound("There is no such path. The routes are listed at GET /docs.")
    if status == 405:
        return MethodNotAllowed(f"{request.method} is not possible here. The routes are listed at GET /docs.")
    return InvalidRequest("The request cannot be read. Check its headers and its body.")


def from_validation(findings: Sequence[Any]) -> VoiceCloneError:
    """The first of pydantic's findings as a typed error. The value that was sent is never repeated."""
    finding = findings[0]
    # loc is ("body", field, …); pydantic adds the name of the union member it tried.
    path = [str(part) for part in finding["loc"] if part not in ("body", "query", "path")]
    param = path[0] if path else None
    kind = str(finding["type"])
    if param is None or kind == "json_invalid":
        return InvalidJson("The body is not a JSON object. Send application/json.")
    if kind == "missing":
        return MissingField(f"'{param}' is missing. Add it to the request.", param=param)
    if param in ("response_format", "output_format"):
        return UnsupportedFormat(f"'{param}': {finding['msg']}.", param=param)
    return InvalidValue(f"'{'.'.join(path)}': {finding['msg']}.", param=param)

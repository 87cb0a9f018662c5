"""What every HTTP request passes before a route sees it: an id, its end, and a limit on its body."""

from __future__ import annotations

import re
from contextlib import suppress

from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from serve_app.errors import BodyTooLarge
from serve_app.ingress.problems import error_response

_CLEAN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestId:
    """Know the request by an id: the ``X-Request-Id`` of the client or of Serve's proxy, or one made here.

    The proxy returns the header and puts the id into every log line; doing so here would send it twice.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with ``scope["state"]["request_id"]`` set."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("x-request-id", "")
        scope.setdefault("state", {})["request_id"] = (
            wanted if _CLEAN_ID.fullmatch(wanted) else f"req_{ULID()}"
        )
        await self._app(scope, receive, send)


class Disconnect:
    """Tell a client that left in the one way the framework knows.

    Ray cancels what is done for it, the wait for its next message among that, which then raises.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a ``receive`` that says "http.disconnect" or "websocket.disconnect"."""

        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": f"{scope['type']}.disconnect"}

        await self._app(scope, receive if scope["type"] == "lifespan" else receive_or_disconnect, send)


class BodyLimit:
    """Refuse a body over the limit: by its declared length at once, else as soon as it has come that far."""

    def __init__(self, app: ASGIApp, *, json_bytes: int, form_bytes: int) -> None:
        self._app = app
        self._json_bytes = json_bytes
        self._form_bytes = form_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a ``receive`` that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").startswith("multipart/form-data")
        limit = self._form_bytes if is_form else self._json_bytes
        too_large = BodyTooLarge(f"The body is larger than {limit} bytes. Send less.")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            await error_response(scope, too_large)(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large
            return message

        async def send_if_within(message: Message) -> None:
            if received <= limit:
                await send(message)

        # The framework makes a 400 of its own of any error in reading a body; ours takes its place.
        with suppress(BodyTooLarge):
            await self._app(scope, receive_counted, send_if_within)
        if received > limit:
            await error_response(scope, too_large)(scope, receive, send)

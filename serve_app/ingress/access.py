"""Access: the one place that decides which requests may pass. A route that is not listed here is not there.

A key carries scopes. A caller without a key has those of ``anonymous`` in the configuration; left out, they
are none if there are keys, and else ``speak`` and ``voices``, with ``admin`` for programs on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.config import ApiKey, BrowserSettings
from serve_app.errors import Forbidden, RouteNotFound, Unauthenticated, VoiceCloneError
from serve_app.ingress.browsers import PageRules
from serve_app.ingress.callers import KEY_PROTOCOL, Callers
from serve_app.ingress.problems import error_response, route_path
from serve_app.protocol import Caller, KeyScope

_SPEAK = frozenset({KeyScope.SPEAK, KeyScope.ADMIN})
_VOICES = frozenset({KeyScope.VOICES, KeyScope.ADMIN})
_ADMIN = frozenset({KeyScope.ADMIN})
_ANY = frozenset(KeyScope)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a path, and everything below it, needs: one of these scopes. None: nothing, not even a key.

    ``*`` stands for one part of a path. A WebSocket needs what writing does.
    """

    path: str
    reads: frozenset[KeyScope] | None
    writes: frozenset[KeyScope] | None

    def pattern(self) -> re.Pattern[str]:
        """What the paths look like that it is about."""
        path = re.escape(self.path).replace(r"\*", "[^/]+")
        return re.compile(rf"{path}(/.*)?", re.DOTALL)


#: The first that fits counts.
RULES = (
    Rule("/health", None, None),
    Rule("/api/health", None, None),
    Rule("/docs", _ANY, _ADMIN),
    Rule("/openapi.json", _ANY, _ADMIN),
    Rule("/v1/models", _ANY, _ADMIN),
    Rule("/v1/audio/models", _ANY, _ADMIN),
    Rule("/v1/audio/speech", _SPEAK, _SPEAK),
    Rule("/v1/audio/voices", _ANY, _VOICES),
    Rule("/v1/audio/voice_consents", _VOICES, _VOICES),
    Rule("/v1/text-to-speech", _SPEAK, _SPEAK),
    Rule("/v1/voices", _ANY, _VOICES),
    Rule("/v2/voices", _ANY, _VOICES),
    Rule("/tts_to_audio", _SPEAK, _SPEAK),
    Rule("/tts_stream", _SPEAK, _SPEAK),
    Rule("/speakers", _ANY, _ADMIN),
    Rule("/speakers_list", _ANY, _ADMIN),
    Rule("/languages", _ANY, _ADMIN),
    Rule("/set_tts_settings", _ANY, _ANY),
    Rule("/api/synthesize", _SPEAK, _SPEAK),
    Rule("/api/batch_synthesize", _SPEAK, _SPEAK),
    Rule("/api/extract_voice", _VOICES, _VOICES),
    Rule("/api/voices", _ANY, _VOICES),
    Rule("/api/status", _ANY, _ADMIN),
    Rule("/ws", _ANY, _ANY),
    # Says where machines are.
    Rule("/api/nodes/*/command", _ADMIN, _ADMIN),
    # Workers of the old system had no key; they are told why they are not needed.
    Rule("/api/nodes/register", _ANY, _ANY),
    Rule("/api/nodes/*/heartbeat", _ANY, _ANY),
    Rule("/api/nodes", _ADMIN, _ADMIN),
    Rule("/api/announcements", _ANY, _ADMIN),
)


_PATTERNS = tuple((rule.pattern(), rule) for rule in RULES)


def rule_for(path: str) -> Rule | None:
    """The rule for a path below the application's root; None for one that nobody may have."""
    return next((rule for pattern, rule in _PATTERNS if pattern.fullmatch(path)), None)


class Access:
    """Lets a request pass or answers it, before anything of its body is read."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        callers: Callers,
        keys: Mapping[str, ApiKey],
        anonymous: Iterable[KeyScope] | None,
        browsers: BrowserSettings,
    ) -> None:
        self._app = app
        self._callers = callers
        self._keys = keys
        self._anonymous = None if anonymous is None else frozenset(anonymous)
        self._pages = PageRules(browsers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or send a refusal."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except VoiceCloneError as error:
            if scope["type"] == "websocket":
                # Closed before it is accepted: a 403 to the client. An answer with a body is what uvicorn can
                # send too, but it logs an error of its own after it.
                await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            else:
                await error_response(scope, error)(scope, receive, send)
            return
        if "subprotocols" in scope:
            # The key must not be chosen, and so sent back, as the protocol to speak.
            protocols = [name for name in scope["subprotocols"] if not name.startswith(KEY_PROTOCOL)]
            scope = {**scope, "subprotocols": protocols}
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raise ``Unauthenticated``, ``Forbidden`` or ``RouteNotFound``."""
        rule = rule_for(route_path(scope))
        reads = scope.get("method") in ("GET", "HEAD")
        needed = _ANY if rule is None else rule.reads if reads else rule.writes
        if needed is None:
            return
        caller = self._callers.caller(scope)
        if not caller.key and (self._anonymous or not self._keys):
            # What needs no key, a page could use that its visitor knows nothing of.
            self._pages.check(scope)
        scopes = self._scopes(caller, scope)
        if not needed & scopes:
            raise _refusal(caller, needed)
        self._callers.remember(scope, replace(caller, admin=KeyScope.ADMIN in scopes))
        if rule is None:
            raise RouteNotFound("There is no such path. The routes are listed at GET /docs.")

    def _scopes(self, caller: Caller, scope: Scope) -> frozenset[KeyScope]:
        if caller.key:
            return frozenset(self._keys[caller.key].scopes)
        if self._anonymous is not None:
            return self._anonymous
        if self._keys:
            return frozenset()
        granted = frozenset({KeyScope.SPEAK, KeyScope.VOICES})
        local = self._callers.is_on_this_machine(scope) and not self._pages.is_foreign(scope)
        return granted | _ADMIN if local else granted


def _refusal(caller: Caller, needed: frozenset[KeyScope]) -> VoiceCloneError:
    scopes = " or ".join(f"'{scope}'" for scope in KeyScope if scope in needed)
    if caller.key:
        return Forbidden(f"This API key lacks the scope {scopes}. Use one that has it.")
    return Unauthenticated(
        f"This needs an API key with the scope {scopes}. Send it as 'Authorization: Bearer KEY'; "
        "whoever runs the server makes one with 'voice-clone keys new NAME'."
    )

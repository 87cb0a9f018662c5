"""What keeps web pages of others out: a browser runs inside its user's network, and asks in the user's name.

- CORS is off unless origins are configured, and never with credentials: nothing here goes by cookies.
- Without API keys, being able to reach the server is all it takes, and a browser can. A page of another
  origin may then neither write nor open a WebSocket, and a name that anybody could register is no name of
  this server: a page can have its own name point here and would share an origin with it (DNS rebinding).
- Answers say that they are not to be guessed at, framed, cached or embedded.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import BrowserSettings
from serve_app.errors import HostNotAllowed, OriginNotAllowed
from serve_app.ingress.problems import route_path

#: Top-level names that nobody can register in the public DNS: RFC 6761, 6762, 8375; ICANN for "internal".
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".test")
#: What a page may read beside the body.
_EXPOSED = (
    "X-Request-Id",
    "X-Engine",
    "X-Voice-Id",
    "X-Language",
    "X-Seed",
    "X-Sample-Rate",
    "X-Utterances",
    "X-Audio-Duration-Ms",
    "X-Ignored-Fields",
    "X-AI-Generated",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
#: FastAPI's page of the routes loads its script and its style from there, and starts them inline.
_DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; "
    "img-src 'self' data: https://fastapi.tiangolo.com; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


class PageRules:
    """Tells requests of this server's own pages, and of programs, from those of other pages."""

    def __init__(self, settings: BrowserSettings) -> None:
        self._origins = frozenset(settings.allowed_origins)
        self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)

    def check(self, scope: Scope) -> None:
        """Raise ``HostNotAllowed`` or ``OriginNotAllowed`` if a page of others may have sent the request."""
        headers = Headers(scope=scope)
        if not self._is_ours(_name(headers.get("host", ""))):
            raise HostNotAllowed(
                "Without API keys this server answers to addresses and local names only. "
                "Configure keys, or add this name to 'browsers.allowed_hosts'."
            )
        only_reads = scope.get("method") in ("GET", "HEAD", "OPTIONS")
        if self.is_foreign(scope) and not only_reads and not self._allows(headers["origin"]):
            raise OriginNotAllowed(
                "Pages of other origins may not use this server. Add theirs to 'browsers.allowed_origins'."
            )

    def is_foreign(self, scope: Scope) -> bool:
        """True for a request of a page that did not come from the host it asks."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        return origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins

    def _is_ours(self, name: str) -> bool:
        try:
            ip_address(name)
        except ValueError:
            # Names of one part are the host's, a container's or a search domain's.
            return "." not in name or name.endswith(_LOCAL_SUFFIXES) or name in self._hosts
        return True


class SafeHeaders:
    """Gives every answer the headers that keep browsers from doing more with it than was meant."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; what it sets itself stays."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                is_page = headers.get("content-type", "").startswith("text/html")
                docs = route_path(scope) == "/docs"
                policy = _DOCS_POLICY if docs else _PAGE_POLICY if is_page else _DATA_POLICY
                for name, value in {**_HEADERS, "Content-Security-Policy": policy}.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_safely)


def add_cors(api: FastAPI, settings: BrowserSettings) -> None:
    """Answer preflights of the configured origins; without any there is no CORS at all."""
    if settings.allowed_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            # OpenAI's client sends a dozen of its own.
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )


def _name(host: str) -> str:
    """The name or address in a ``Host`` header, without the port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rsplit(":", 1)[0].rstrip(".") if host.count(":") <= 1 else host

"""Which requests pass: every route of the application, every way to send a key, and none by accident."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from serve_app.config import BrowserSettings, Settings
from serve_app.errors import Overloaded
from serve_app.ingress.access import RULES, Access, rule_for
from serve_app.ingress.api import build_api
from serve_app.ingress.callers import Callers
from serve_app.protocol import KeyScope

SECRETS = {"reader": "vc_reader", "studio": "vc_studio", "desk": "vc_desk", "boss": "vc_boss"}
SCOPES = {"reader": ["speak"], "studio": ["voices"], "desk": ["speak", "voices"], "boss": ["admin"]}
KEYS = {
    name: {"sha256": hashlib.sha256(secret.encode()).hexdigest(), "scopes": SCOPES[name]}
    for name, secret in SECRETS.items()
}
OPEN = {"/health/live", "/health/ready", "/api/health"}


class Busy:
    """A router that answers nothing: who gets that far has passed."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*args: object, **kwargs: object) -> Any:
            raise Overloaded("Busy. Try again.")

        return refuse


def build(**settings: Any) -> FastAPI:
    return _build(json.dumps(settings))


@functools.cache
def _build(settings: str) -> FastAPI:
    router: Any = Busy()
    return build_api(router, Settings.model_validate({"engines": {"tone": {}}, **json.loads(settings)}))


def routes(of: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route, those of included routers too. A WebSocket's method is empty."""
    for route in of.routes:
        if hasattr(route, "original_router"):
            yield from routes(route.original_router)
        elif methods := getattr(route, "methods", None):
            yield from ((method, route.path) for method in methods)
        else:
            assert type(route).__name__ == "APIWebSocketRoute", f"what is {route!r}?"
            yield "", route.path


ROUTES = sorted(set(routes(build())))


def ask(
    api: FastAPI,
    method: str = "GET",
    path: str = "/v1/models",
    *,
    peer: str = "10.0.0.1",
    host: str = "10.0.0.9:8000",
    **headers: str,
) -> httpx.Response:
    """One request from a peer. Names of headers have '_' for '-'."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=api, client=(peer, 41234))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, path, headers=sent)

    return asyncio.run(send())


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


def test_every_route_is_in_the_rules_and_every_rule_has_a_scope() -> None:
    assert len(ROUTES) > 10
    assert {path for _, path in ROUTES} >= {"/v1/audio/speech", "/api/voices/{voice_id}", "/docs"}
    for _, path in ROUTES:
        assert rule_for(re.sub(r"{\w+}", "x", path)) is not None, f"{path} has no rule, so nobody may have it"
    for rule in RULES:
        assert rule.reads or (rule.reads is None and rule.path.endswith("/health")), rule
        assert rule.writes or rule.reads is None, rule


@pytest.mark.parametrize(("method", "path"), [(m, p) for m, p in ROUTES if m])
def test_no_route_is_open_by_accident(method: str, path: str) -> None:
    api = build(keys=KEYS)
    path = re.sub(r"{\w+}", "x", path)
    rule = rule_for(path)
    assert rule is not None
    needed = rule.reads if method in ("GET", "HEAD") else rule.writes
    for peer in ("10.0.0.1", "127.0.0.1"):
        refused = ask(api, method, path, peer=peer)
        if path in OPEN:
            assert needed is None
            assert refused.status_code in (200, 503)
            continue
        assert refused.status_code == 401, path
        assert refused.headers["www-authenticate"] == "Bearer"
        assert ask(api, method, path, peer=peer, authorization="Bearer vc_none").status_code == 401
    if needed is None:
        return
    for name, scopes in SCOPES.items():
        status = ask(api, method, path, **bearer(name)).status_code
        allowed = bool(needed & {KeyScope(scope) for scope in scopes})
        assert (status == 403) != allowed, (name, status)
        assert status not in (401, 500)


@pytest.mark.parametrize(("method", "path"), [(m, p) for m, p in ROUTES if m])
def test_without_keys_only_programs_on_this_machine_are_admins(method: str, path: str) -> None:
    api = build()
    path = re.sub(r"{\w+}", "x", path)
    rule = rule_for(path)
    assert rule is not None
    needed = rule.reads if method in ("GET", "HEAD") else rule.writes
    admin = needed == frozenset({KeyScope.ADMIN})
    assert (ask(api, method, path, peer="10.0.0.1").status_code == 401) == admin
    assert ask(api, method, path, peer="127.0.0.1", host="localhost:8000").status_code not in (401, 403)


def test_what_is_in_no_rule_is_not_there() -> None:
    api = build(keys=KEYS, anonymous=[])

    @api.get("/forgotten")
    async def forgotten() -> str:
        return "secret"

    assert ask(api, path="/forgotten").status_code == 401
    hidden = ask(api, path="/forgotten", **bearer("boss"))
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "route_not_found")
    # Close to a rule is not in it.
    for path in ("/v1/modelsx", "/v1", "/docsx", "/health-check", "//v1/models", "/api", "/V1/models"):
        assert ask(api, path=path).status_code == 401, path
        assert ask(api, path=path, **bearer("boss")).status_code == 404, path


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer vc_reader"},
        {"authorization": "bearer   vc_reader "},
        {"xi_api_key": "vc_reader"},
        {"x_api_key": "vc_reader"},
        # A client that insists on a Bearer of its own is told apart by the other header.
        {"authorization": "Bearer dummy", "xi_api_key": "vc_reader"},
    ],
)
def test_a_key_is_taken_from_each_header_clients_use(headers: dict[str, str]) -> None:
    assert ask(build(keys=KEYS), **headers).status_code == 503


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/models", {}),
        ("/v1/models", {"authorization": "Bearer vc_wrong"}),
        ("/v1/models", {"authorization": "Bearer"}),
        ("/v1/models", {"authorization": "Bearer   "}),
        ("/v1/models", {"authorization": "vc_reader"}),
        ("/v1/models", {"authorization": "Basic vc_reader"}),
        ("/v1/models", {"authorization": "Bearer vc_reader vc_reader"}),
        ("/v1/models", {"authorization": "Bearer VC_READER"}),
        ("/v1/models", {"authorization": f"Bearer {hashlib.sha256(b'vc_reader').hexdigest()}"}),
        ("/v1/models", {"authorization": "Bearer " + "x" * (1 << 20)}),
        ("/v1/models", {"authorization": "Bearer reader"}),
        ("/v1/models", {"x_api_key": ""}),
        ("/v1/models", {"cookie": "authorization=vc_reader"}),
        ("/v1/models?api_key=vc_reader&key=vc_reader&xi-api-key=vc_reader&authorization=vc_reader", {}),
    ],
    ids=range(14),
)
def test_c1_nothing_else_is_taken_for_a_key(path: str, headers: dict[str, str]) -> None:
    answer = ask(build(keys=KEYS), path=path, **headers)
    assert answer.status_code == 401
    problem = answer.json()
    assert problem["error"]["code"] == "invalid_api_key"
    assert problem["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-should-retry"] == "false"
    assert "voice-clone keys new" in problem["detail"]
    assert "vc_" not in answer.text


def test_c1_every_key_is_compared_by_digest_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def spy(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", spy)
    for secret in ("vc_reader", "vc_boss", "wrong"):
        compared.clear()
        ask(build(keys=KEYS), authorization=f"Bearer {secret}", path="/nowhere")
        digests = {other for _, other in compared}
        assert digests == {str(key["sha256"]) for key in KEYS.values()}
        assert {one for one, _ in compared} == {hashlib.sha256(secret.encode()).hexdigest()}


def test_errors_have_the_shape_of_their_dialect() -> None:
    body = ask(build(keys=KEYS), "POST", "/api/synthesize").json()
    assert body["success"] is False
    assert body["code"] == "AUTH_ERROR"


def test_a_refused_upload_is_not_read() -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield b"x" * 1024

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=build(keys=KEYS))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/v1/audio/voices", content=endless())

    assert asyncio.run(send()).status_code == 401
    assert read <= 1


# --- who is on this machine -----------------------------------------------------------------------------


@pytest.fixture
def guarded() -> FastAPI:
    """An application with one route that needs ``admin``: writing to a list that nobody writes."""
    return build()


#: Any rule that needs `admin` without any key will do.
ADMIN = ("POST", "/v1/models")


@pytest.mark.parametrize(
    ("peer", "host", "headers", "local"),
    [
        ("127.0.0.1", "localhost:8000", {}, True),
        ("127.0.0.1", "127.0.0.1:8000", {}, True),
        ("::1", "[::1]:8000", {}, True),
        ("::ffff:127.0.0.1", "localhost", {}, True),
        ("127.0.0.1", "localhost:8000", {"origin": "http://localhost:8000"}, True),
        ("10.0.0.1", "localhost:8000", {}, False),
        ("10.0.0.1", "10.0.0.9:8000", {"x_forwarded_for": "127.0.0.1"}, False),
        # A proxy on this machine speaks for others.
        ("127.0.0.1", "localhost:8000", {"x_forwarded_for": "1.2.3.4"}, False),
        ("127.0.0.1", "localhost:8000", {"x_forwarded_for": "127.0.0.1"}, False),
        ("127.0.0.1", "localhost:8000", {"forwarded": "for=1.2.3.4"}, False),
        ("127.0.0.1", "localhost:8000", {"x_real_ip": "1.2.3.4"}, False),
        ("127.0.0.1", "localhost:8000", {"via": "1.1 front"}, False),
        # A page in a browser on this machine.
        ("127.0.0.1", "localhost:8000", {"origin": "https://evil.example"}, False),
        ("127.0.0.1", "localhost:8000", {"origin": "http://localhost:3000"}, False),
        ("127.0.0.1", "localhost:8000", {"origin": "null"}, False),
        ("127.0.0.1", "evil.example:8000", {"origin": "http://evil.example:8000"}, False),
    ],
)
def test_admin_without_keys(
    guarded: FastAPI, peer: str, host: str, headers: dict[str, str], local: bool
) -> None:
    status = ask(guarded, *ADMIN, peer=peer, host=host, **headers).status_code
    assert (status == 405) if local else (status in (401, 403))


def test_behind_haproxy_nobody_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert ask(_build.__wrapped__("{}"), *ADMIN, peer="127.0.0.1", host="localhost").status_code == 401


def test_pages_that_may_speak_are_still_no_admins() -> None:
    api = build(browsers={"allowed_origins": ["https://app.example"]})
    page = {"origin": "https://app.example"}
    assert ask(api, "POST", "/api/synthesize", peer="127.0.0.1", host="localhost", **page).status_code == 400
    assert ask(api, *ADMIN, peer="127.0.0.1", host="localhost", **page).status_code == 401


# --- callers without a key ------------------------------------------------------------------------------


def test_what_callers_without_a_key_may_do_is_configured() -> None:
    api = build(keys=KEYS, anonymous=["speak"])
    assert ask(api, "POST", "/v1/audio/speech").status_code == 400
    assert ask(api, "POST", "/v1/audio/voices").status_code == 401
    assert ask(api, *ADMIN, peer="127.0.0.1", host="localhost").status_code == 401
    closed = build(anonymous=[])
    assert ask(closed, "POST", "/v1/audio/speech").status_code == 401
    assert ask(closed, path="/health/live").status_code == 200


# --- browsers -------------------------------------------------------------------------------------------


PREFLIGHT = {
    "origin": "https://app.example",
    "access_control_request_method": "POST",
    "access_control_request_headers": "authorization, x-stainless-os",
}


def test_c3_no_cors_unless_configured() -> None:
    for keys in ({}, KEYS):
        api = build(keys=keys)
        preflight = ask(api, "OPTIONS", "/v1/audio/speech", **PREFLIGHT)
        assert preflight.status_code in (401, 405)
        plain = ask(api, origin="https://app.example")
        for answer in (preflight, plain):
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed", ["https://app.example", "*"])
def test_c3_configured_origins_may_ask_but_never_with_credentials(allowed: str) -> None:
    api = build(keys=KEYS, browsers={"allowed_origins": [allowed]})
    preflight = ask(api, "OPTIONS", "/v1/audio/speech", **PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == allowed
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"].lower()
    refused = ask(api, "POST", "/v1/audio/speech", origin="https://app.example")
    assert refused.status_code == 401
    # The page can read why.
    assert refused.headers["access-control-allow-origin"] == allowed
    passed = ask(api, "POST", "/v1/audio/speech", origin="https://app.example", **bearer("reader"))
    assert "X-Engine" in passed.headers["access-control-expose-headers"]
    for answer in (preflight, refused, passed):
        assert "access-control-allow-credentials" not in answer.headers
    other = ask(api, "OPTIONS", "/v1/audio/speech", **{**PREFLIGHT, "origin": "https://evil.example"})
    assert ("access-control-allow-origin" in other.headers) == (allowed == "*")


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "10.0.0.9:8000", 400),
        ("http://10.0.0.9:8000", "10.0.0.9:8000", 400),
        ("https://voices.internal", "voices.internal", 400),
        ("http://10.0.0.9:3000", "10.0.0.9:8000", 403),
        ("https://evil.example", "10.0.0.9:8000", 403),
        ("null", "10.0.0.9:8000", 403),
        ("http://localhost.evil.example", "localhost", 403),
        ("", "10.0.0.9:8000", 403),
        ("garbage", "10.0.0.9:8000", 403),
    ],
)
def test_pages_of_others_cannot_write_without_keys(origin: str | None, host: str, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    for path in ("/v1/audio/speech", "/v1/audio/voices", "/api/extract_voice"):
        answer = ask(build(), "POST", path, host=host, **headers)
        assert answer.status_code == status, path
    if status == 403:
        assert ask(build(), "DELETE", "/v1/audio/voices/x", host=host, **headers).status_code == 403
        # A key is what a page of others has not got: with one, any page is fine.
        keyed = ask(build(keys=KEYS), "POST", "/v1/audio/voices", host=host, **headers, **bearer("desk"))
        assert keyed.status_code == 400


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("192.168.1.5:8000", True),
        ("tts:8000", True),
        ("tts.default.svc.cluster.local", True),
        ("box.internal:80", True),
        ("LOCALHOST.", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("evil.example.", False),
        ("2130706433.example", False),
    ],
)
def test_names_that_anybody_could_have_registered_are_not_ours(host: str, ours: bool) -> None:
    answer = ask(build(), host=host)
    assert (answer.status_code == 503) == ours
    if not ours:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert ask(build(keys=KEYS), host=host, **bearer("reader")).status_code == 503
    assert ask(build(), host=host, path="/health/live").status_code == 200


def test_a_public_name_is_configured() -> None:
    api = build(browsers={"allowed_hosts": ["Voices.Example"]})
    assert ask(api, host="voices.example:443").status_code == 503
    assert ask(api, host="other.example").status_code == 403


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://a b", "ftp://app.example"]
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="origin"):
        BrowserSettings(allowed_origins=(origin,))


def test_answers_are_not_for_guessing_framing_caching_or_embedding() -> None:
    api = build()
    for answer in (
        ask(api),
        ask(api, path="/nowhere"),
        ask(api, path="/docs"),
        ask(api, "POST", "/api/synthesize"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "default-src 'none'" in ask(api).headers["content-security-policy"]
    docs = ask(api, path="/docs").headers["content-security-policy"]
    assert "default-src 'self'" in docs


# --- WebSockets -----------------------------------------------------------------------------------------


def sockets(**settings: Any) -> TestClient:
    api = FastAPI()

    @api.websocket("/v1/audio/speech/stream")
    async def stream(socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]
        await socket.accept(offered[0] if offered else None)
        await socket.send_json(offered)
        await socket.close()

    tree = Settings.model_validate({"engines": {"tone": {}}, **settings})
    callers = Callers(tree.keys, [])
    api.add_middleware(
        Access, callers=callers, keys=tree.keys, anonymous=tree.anonymous, browsers=tree.browsers
    )
    return TestClient(api, base_url="http://localhost")


def opened(
    client: TestClient, protocols: list[str] | None = None, headers: dict[str, str] | None = None
) -> list[str] | None:
    """Sub-protocols the handler was offered; None if it was not reached."""
    path = "/v1/audio/speech/stream"
    try:
        with client.websocket_connect(path, subprotocols=protocols, headers=headers or {}) as socket:
            offered: list[str] = socket.receive_json()
            return offered
    except WebSocketDisconnect:
        return None


def test_a_socket_needs_a_key_like_everything_else() -> None:
    client = sockets(keys=KEYS)
    assert opened(client) is None
    assert opened(client, headers={"authorization": "Bearer vc_wrong"}) is None
    assert opened(client, headers=bearer("studio")) is None
    assert opened(client, headers=bearer("reader")) == []
    assert opened(client, headers={"xi-api-key": "vc_reader"}) == []


def test_a_page_sends_its_key_as_a_sub_protocol_which_is_not_sent_back() -> None:
    client = sockets(keys=KEYS)
    assert opened(client, ["realtime", "openai-insecure-api-key.vc_reader"]) == ["realtime"]
    assert opened(client, ["realtime", "openai-insecure-api-key.vc_wrong"]) is None
    assert opened(client, ["vc_reader"]) is None


def test_a_page_of_others_opens_no_socket_without_keys() -> None:
    evil = {"origin": "https://evil.example"}
    client = sockets()
    assert opened(client) == []
    assert opened(client, headers={"origin": "http://testserver"}) == []
    assert opened(client, headers=evil) is None
    assert opened(sockets(browsers={"allowed_origins": [evil["origin"]]}), headers=evil) == []

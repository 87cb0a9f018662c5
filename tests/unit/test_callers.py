"""Who asks: keys, addresses, and headers that pretend to be somebody else."""

from __future__ import annotations

import asyncio
import hashlib
from ipaddress import ip_network
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from serve_app.config import ApiKey, Settings
from serve_app.ingress import openai
from serve_app.ingress.callers import Callers
from serve_app.protocol import Caller, Priority, SpeechRequest

KEYS = {
    "studio": ApiKey(sha256=hashlib.sha256(b"s3cret").hexdigest()),
    "batch": ApiKey(sha256=hashlib.sha256(b"night shift").hexdigest(), bulk_only=True),
}


def caller(
    peer: str,
    *forwarded: str,
    trusted: tuple[str, ...] = (),
    authorization: str = "",
    haproxy: bool = False,
    uvicorn: bool = True,
) -> Caller:
    """The caller of a request as it arrives: through uvicorn with its defaults, as Serve starts it."""
    headers = [(b"x-forwarded-for", line.encode("latin-1")) for line in forwarded]
    if authorization:
        headers.append((b"authorization", authorization.encode("latin-1")))
    scope: dict[str, Any] = {"type": "http", "client": (peer, 41234), "scheme": "http", "headers": headers}
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    entry: Any = ProxyHeadersMiddleware(app, ["127.0.0.1", "::1"]) if uvicorn else app  # type: ignore[arg-type]
    asyncio.run(entry(scope, None, None))
    callers = Callers(KEYS, [ip_network(one) for one in trusted], behind_haproxy=haproxy)
    return callers.caller(seen[0])


@pytest.mark.parametrize(
    ("authorization", "name"),
    [
        ("Bearer s3cret", "studio"),
        ("bearer  s3cret ", "studio"),
        ("Bearer night shift", "batch"),
        ("Bearer S3cret", ""),
        ("Bearer none", ""),
        ("Bearer ", ""),
        ("Bearer", ""),
        ("Basic s3cret", ""),
        ("Bearer " + hashlib.sha256(b"s3cret").hexdigest(), ""),
        ("Bearer \xff\x00", ""),
        ("Bearer " + "x" * 60_000, ""),
        ("", ""),
    ],
)
def test_key(authorization: str, name: str) -> None:
    assert caller("10.0.0.1", authorization=authorization).key == name


SPOOFS = [
    "6.6.6.6",
    "6.6.6.6:80",
    "6.6.6.6, 127.0.0.1",
    "127.0.0.1",
    "::1",
    "[::1]:99",
    "::ffff:127.0.0.1",
    "::ffff:6.6.6.6",
    "[6.6.6.6]:7",
    "[6.6.6.6]x",
    "[6.6.6.6",
    "6.6.6.6:x",
    "6.6.6.6:+5",
    "6.6.6.6: 5",
    "garbage",
    "",
    ",",
    ",6.6.6.6",
    "6.6.6.6,",
    "\xff",
]


@pytest.mark.parametrize("spoof", SPOOFS)
@pytest.mark.parametrize("peer", ["127.0.0.1", "10.0.0.1"])
@pytest.mark.parametrize("uvicorn", [True, False])
def test_forwarded_headers_of_strangers_change_nothing(spoof: str, peer: str, uvicorn: bool) -> None:
    assert caller(peer, spoof, uvicorn=uvicorn).address == peer
    assert caller(peer, "6.6.6.6", spoof, uvicorn=uvicorn).address == peer


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.9", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.9", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.9", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        ("10.0.0.9", ["6.6.6.6, 1.2.3.4, 10.0.0.8"], "1.2.3.4"),
        ("10.0.0.9", ["1.2.3.4:5678"], "1.2.3.4"),
        ("10.0.0.9", ["[2001:db8:1:2:3::4]:5678"], "2001:db8:1:2::/64"),
        ("10.0.0.9", ["10.0.0.7, 10.0.0.8"], "10.0.0.7"),
        ("10.0.0.9", ["6.6.6.6, garbage"], "10.0.0.9"),
        ("10.0.0.9", ["1.2.3.4, garbage, 10.0.0.8"], "10.0.0.8"),
        ("10.0.0.9", [], "10.0.0.9"),
        ("10.0.0.9", [""], "10.0.0.9"),
        ("::ffff:10.0.0.9", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.1.1", ["1.2.3.4"], "10.0.1.1"),
        ("127.0.0.1", ["1.2.3.4"], "127.0.0.1"),
    ],
)
def test_trusted_proxies_are_believed_for_their_own_hop(
    peer: str, forwarded: list[str], address: str
) -> None:
    assert caller(peer, *forwarded, trusted=("10.0.0.0/24",)).address == address


@pytest.mark.parametrize("forwarded", ["1.2.3.4", "1.2.3.4:80", "6.6.6.6, 1.2.3.4, 10.0.0.8"])
def test_a_trusted_proxy_on_this_machine(forwarded: str) -> None:
    trusted = ("127.0.0.1", "10.0.0.0/24")
    assert caller("127.0.0.1", forwarded, trusted=trusted).address == "1.2.3.4"


def test_ipv6_counts_by_network() -> None:
    assert caller("2001:db8::1").client == caller("2001:db8::ffff:1").client
    assert caller("2001:db8::1").client != caller("2001:db8:0:1::1").client


@pytest.mark.parametrize("spoof", SPOOFS)
def test_haproxy_tells_no_address_and_keeps_what_clients_wrote(spoof: str) -> None:
    assert caller("127.0.0.1", spoof, haproxy=True).address == "unknown"
    assert caller("127.0.0.1", haproxy=True, trusted=("127.0.0.1",)).address == "unknown"


def test_a_proxy_in_front_of_haproxy_is_believed() -> None:
    hops = {"haproxy": True, "trusted": ("127.0.0.1",)}
    assert caller("127.0.0.1", "6.6.6.6, 1.2.3.4", **hops).address == "1.2.3.4"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("authorization", "body", "priority"),
    [
        ("", {}, Priority.INTERACTIVE),
        ("", {"priority": "bulk"}, Priority.BULK),
        ("Bearer s3cret", {"priority": "interactive"}, Priority.INTERACTIVE),
        ("Bearer night shift", {"priority": "interactive"}, Priority.BULK),
    ],
)
def test_priority(authorization: str, body: dict[str, str], priority: Priority) -> None:
    spoken: list[SpeechRequest] = []

    class Router:
        def speak(self, request: SpeechRequest) -> Any:
            spoken.append(request)
            raise RuntimeError("heard")

    api = FastAPI()
    router: Any = Router()
    api.include_router(openai.routes(router, Callers(KEYS, []), Settings()))

    @api.middleware("http")
    async def request_id(request: Any, call_next: Any) -> Any:
        request.state.request_id = "id"
        return await call_next(request)

    with pytest.raises(RuntimeError, match="heard"):
        TestClient(api).post(
            "/v1/audio/speech",
            json={"input": "Hi.", "voice": "anna", **body},
            headers={"authorization": authorization} if authorization else {},
        )
    assert spoken[0].priority is priority
    wrong = TestClient(api).post(
        "/v1/audio/speech", json={"input": "Hi.", "voice": "anna", "priority": "now"}
    )
    assert wrong.status_code == 422


def test_settings_take_addresses_and_networks() -> None:
    settings = Settings.model_validate({"trusted_proxies": ["10.0.0.1", "10.1.0.0/16", "::1", "fd00::/8"]})
    assert [str(one) for one in settings.trusted_proxies] == [
        "10.0.0.1/32",
        "10.1.0.0/16",
        "::1/128",
        "fd00::/8",
    ]

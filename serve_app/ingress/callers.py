"""Who asks: the API key a request carries, and the address it comes from.

A key comes as ``Authorization: Bearer KEY``, ``xi-api-key: KEY`` or ``x-api-key: KEY``. A web page cannot set
headers of a WebSocket; there it may come as a sub-protocol, ``openai-insecure-api-key.KEY``, as OpenAI's own
client sends it. Never in the query: addresses end up in logs and histories.

The address is the peer of the connection. Only where that peer is a configured proxy is ``X-Forwarded-For``
believed, and of it only what such proxies wrote: it is read from the right, past trusted hops.

Two layers of Serve would have it otherwise:

- uvicorn, under Serve's default proxy as under its HAProxy, believes ``X-Forwarded-For`` of any peer on the
  loopback interface and overwrites the peer with it. That is undone here.
- HAProxy in front of the ingress neither adds a client's address nor removes what the client wrote into
  ``X-Forwarded-For``. What arrives through it has no address of its own, unless another proxy in front adds
  one and HAProxy's addresses are configured as trusted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import Scope

from serve_app.config import ApiKey
from serve_app.protocol import UNKNOWN_ADDRESS, Caller, Priority

_Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network

_LOOPBACK = IPv4Address("127.0.0.1")
#: What uvicorn believes unless told otherwise.
_UVICORN_TRUSTS = (_LOOPBACK, IPv6Address("::1"))
#: Sub-protocol of a WebSocket that carries a key.
KEY_PROTOCOL = "openai-insecure-api-key."
#: What proxies say about whom they speak for; none of it comes from a client that connects itself.
_FORWARDING = ("x-forwarded-for", "x-real-ip", "forwarded", "via")
#: One host or household has at least this much of IPv6, and would have as many budgets as addresses in it.
_IPV6_PREFIX_BITS = 64


class Callers:
    """Tells requests apart by key and by address."""

    def __init__(
        self,
        keys: Mapping[str, ApiKey],
        trusted_proxies: Sequence[_Network],
        *,
        behind_haproxy: bool | None = None,
    ) -> None:
        self._keys = keys
        self._trusted = tuple(trusted_proxies)
        if behind_haproxy is None:
            behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
        self._behind_haproxy = behind_haproxy

    def caller(self, scope: Scope) -> Caller:
        """Who sent the request of this ASGI scope."""
        known: Caller | None = scope.get("state", {}).get("caller")
        if known is not None:
            return known
        headers = Headers(scope=scope)
        address = self._address(scope, headers)
        name = self._key(scope, headers)
        if not name:
            return Caller(address)
        return Caller(address, name, owner=self._keys[name].owner or name)

    def priority(self, caller: Caller, wanted: Priority) -> Priority:
        """What ``caller`` gets who wants ``wanted``."""
        key = self._keys.get(caller.key)
        return Priority.BULK if key is not None and key.bulk_only else wanted

    @staticmethod
    def remember(scope: Scope, caller: Caller) -> None:
        """Have ``caller`` be who sent the request, for all who ask from now on."""
        scope.setdefault("state", {})["caller"] = caller

    def is_on_this_machine(self, scope: Scope) -> bool:
        """True if the request certainly comes from a program on this machine, and through no proxy."""
        headers = Headers(scope=scope)
        if self._behind_haproxy or any(name in headers for name in _FORWARDING):
            return False
        return scope.get("client") is not None and _peer(scope, [""]).is_loopback

    def _key(self, scope: Scope, headers: Headers) -> str:
        """Name of the key sent; empty without one, or with one not ours, as many clients send."""
        holder = ""
        for secret in _sent_keys(scope, headers):
            sent = hashlib.sha256(secret.encode("latin-1", "replace")).hexdigest()
            # Every key is compared, whichever fits: the time taken says nothing.
            for name, key in self._keys.items():
                if hmac.compare_digest(sent, key.sha256):
                    holder = holder or name
        return holder

    def _address(self, scope: Scope, headers: Headers) -> str:
        forwarded = [entry.strip() for entry in ",".join(headers.getlist("x-forwarded-for")).split(",")]
        peer = _peer(scope, forwarded)
        address = peer
        hops = 0
        for entry in reversed(forwarded):
            hop = _parse(_host_and_port(entry)[0])
            if hop is None or not self._trusts(address):
                break
            address = hop
            hops += 1
        if self._behind_haproxy and not hops:
            return UNKNOWN_ADDRESS
        if isinstance(address, IPv6Address):
            return str(ip_network((address, _IPV6_PREFIX_BITS), strict=False))
        return str(address)

    def _trusts(self, address: _Address) -> bool:
        return any(address in network for network in self._trusted)


def _sent_keys(scope: Scope, headers: Headers) -> Iterator[str]:
    """Everything in the request that may be a key."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield secret.strip()
    for header in ("xi-api-key", "x-api-key"):
        if header in headers:
            yield headers[header].strip()
    for protocol in scope.get("subprotocols", ()):
        if protocol.startswith(KEY_PROTOCOL):
            yield protocol.removeprefix(KEY_PROTOCOL)


def _peer(scope: Scope, forwarded: Sequence[str]) -> _Address:
    """The other end of the connection, before uvicorn put a forwarded address in its place."""
    client = scope.get("client")
    if client is None:
        return _LOOPBACK
    host, port = client
    # A peer is always an address; anything else has been copied from a header.
    peer = _parse(host)
    if peer is None or (host, port) == _as_uvicorn_reads(forwarded):
        return _LOOPBACK
    return peer


def _as_uvicorn_reads(forwarded: Sequence[str]) -> tuple[str, int]:
    """What uvicorn takes for the client: the rightmost address not on loopback, else the first of all."""
    for entry in reversed(forwarded):
        host, port = _host_and_port(entry)
        # Unlike here, ::ffff:127.0.0.1 is not 127.0.0.1 there.
        if host.startswith("::ffff:") or _parse(host) not in _UVICORN_TRUSTS:
            return host, port
    return _host_and_port(forwarded[0])


def _host_and_port(entry: str) -> tuple[str, int]:
    """``host``, ``host:port`` or ``[host]:port``; port 0 if there is none."""
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        port = rest.removeprefix(":")
    elif entry.count(":") == 1:
        host, port = entry.split(":")
    else:
        return entry, 0
    try:
        return host, int(port)
    except ValueError:
        return host, 0


def _parse(host: str) -> _Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    # A socket that serves both families shows IPv4 peers as ::ffff:a.b.c.d.
    return getattr(address, "ipv4_mapped", None) or address

"""Admission: the first thing a request meets in the router. It is let in at once or refused at once.

Every caller counts against the total limits, one with a key against the key's, one without against those of
its address. What a limit is reached by, and when it will not be, goes with the refusal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from ulid import ULID

from serve_app.config import ApiKey, LimitSettings, Quota
from serve_app.errors import (
    InputTooLong,
    Overloaded,
    RateLimited,
    ReachedLimit,
    TooManyAtOnce,
    VoiceCloneError,
)
from serve_app.protocol import LOCAL_ADDRESS, UNKNOWN_ADDRESS, Caller
from serve_app.router.limits.budget import WINDOW_S, Account, Counts, Demand, Refused, Scope
from serve_app.router.limits.budget_actor import ActorBooks
from serve_app.router.limits.leases import LeasedBudget, SharedBooks

#: Addresses that tell no two callers apart.
_NO_ADDRESS = (LOCAL_ADDRESS, UNKNOWN_ADDRESS)
_WHOSE = {
    Scope.TOTAL: "this server",
    Scope.KEY: "this API key",
    Scope.IP: "this address",
}
_POLICY = {Scope.TOTAL: "", Scope.KEY: "-per-key", Scope.IP: "-per-ip"}


class Budget(Protocol):
    """Where it is counted what callers use."""

    async def take(self, demands: tuple[Demand, ...]) -> Refused | None:
        """Take all of ``demands``, or nothing and say why not."""

    def give_back(self, demands: tuple[Demand, ...]) -> asyncio.Future[None]:
        """Give slots back. The future is done when other routers may have them."""

    async def close(self) -> None:
        """Let go of connections and tasks."""


class Admission:
    """The limits of one router. They hold over all routers."""

    def __init__(self, limits: LimitSettings, keys: Mapping[str, ApiKey], budget: Budget) -> None:
        self._limits = limits
        self._keys = keys
        self._budget = budget

    @classmethod
    def open(cls, limits: LimitSettings, keys: Mapping[str, ApiKey]) -> Admission:
        """Admission that shares its state as ``limits.state`` says. Needs a running event loop."""
        if limits.state != "leases":
            # The libraries are an extra.
            from serve_app.router.limits.redis_budget import RedisBudget

            return cls(limits, keys, RedisBudget(limits.state))
        router = str(ULID())
        return cls(limits, keys, LeasedBudget(router, SharedBooks(router, ActorBooks()).answer))

    def reconfigure(self, limits: LimitSettings, keys: Mapping[str, ApiKey] | None = None) -> None:
        """Hold other limits from now on; ``limits.state`` stays. What was used before counts on."""
        self._limits = limits
        if keys is not None:
            self._keys = keys

    @asynccontextmanager
    async def admit(self, caller: Caller, characters: int) -> AsyncGenerator[None, None]:
        """Let a request in for the length of the context.

        Raises ``RateLimited`` or ``TooManyAtOnce`` (429), ``Overloaded`` (503), and ``InputTooLong`` for a
        text that no amount of waiting lets in.
        """
        demands = self._demands(caller, characters)
        if demands and (refused := await self._budget.take(demands)):
            raise _error(refused)
        try:
            yield
        except BaseException:
            # The caller may be gone, or its task cancelled: nobody waits for the others to know.
            if demands:
                self._budget.give_back(demands)
            raise
        if demands:
            # Before the end of the answer reaches the client: its next request must find the slot free.
            await self._budget.give_back(demands)

    async def close(self) -> None:
        """Let go of connections and tasks."""
        await self._budget.close()

    def _demands(self, caller: Caller, characters: int) -> tuple[Demand, ...]:
        """What the request needs. The caller's own limits come first: of two reached, they are named."""
        limits = self._limits
        demands: list[Demand] = []
        if key := self._keys.get(caller.key):
            demands += _of_quota(_merged(key, limits.per_key), Scope.KEY, caller.key, characters)
        elif caller.address not in _NO_ADDRESS:
            demands += _of_quota(limits.per_ip, Scope.IP, caller.address, characters)
        demands += _of_quota(limits.total, Scope.TOTAL, "", characters)
        return tuple(demands)


def _merged(key: ApiKey, default: Quota) -> Quota:
    """A key's own limits, and the default where it has none."""
    return Quota(
        **{
            name: getattr(default, name) if getattr(key, name) is None else getattr(key, name)
            for name in Quota.model_fields
        }
    )


def _of_quota(quota: Quota, scope: Scope, subject: str, characters: int) -> list[Demand]:
    wanted = (
        (Counts.REQUESTS, 1, quota.requests_per_minute),
        (Counts.CHARACTERS, characters, quota.characters_per_minute),
        (Counts.SLOTS, 1, quota.concurrent),
    )
    demands = []
    for counts, units, limit in wanted:
        if limit is None or not units:
            continue
        if units > limit:
            raise InputTooLong(
                f"The text has {units} characters; {limit} a minute are allowed for {_WHOSE[scope]}. "
                "Send it in parts.",
                param="input",
            )
        demands.append(Demand(Account(counts, scope, subject), units, limit))
    return demands


def _error(refused: Refused) -> VoiceCloneError:
    """What the client is told."""
    (counts, scope, _), _, quota = refused.demand
    slots = counts is Counts.SLOTS
    limit = ReachedLimit(
        policy=f"{counts}{_POLICY[scope]}",
        counts=counts,
        quota=quota,
        remaining=refused.remaining,
        window_s=None if slots else WINDOW_S,
    )
    if slots and scope is Scope.TOTAL:
        kind: type[VoiceCloneError] = Overloaded
        message = "The server is busy with as many requests as it takes. Try again in a moment."
    elif slots:
        kind = TooManyAtOnce
        message = f"{quota} requests at once are allowed for {_WHOSE[scope]}. Wait for one to end."
    else:
        kind = RateLimited
        message = (
            f"{quota} {counts} a minute are allowed for {_WHOSE[scope]}. "
            "Try again after the time in Retry-After."
        )
    return kind(message, retry_after_s=refused.retry_after_s, limit=limit)

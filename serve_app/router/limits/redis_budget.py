"""RedisBudget: limits shared through Redis, for several clusters behind one limit.

Rates are moving windows of the ``limits`` library. Slots are members of a sorted set with the time at which
they end: a router that lives renews them, one that was killed leaves none behind for long.

Errors are on the strict side but for one: the windows go by the clocks of the machines that run routers, and
are off by as much as those differ. A request that two routers race for may count against a limit although
another limit refuses it. Without Redis each router holds every limit by itself, over what it let in itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError
from ulid import ULID

from serve_app.router.limits.budget import (
    SLOT_RETRY_S,
    WINDOW_S,
    Account,
    Ask,
    Books,
    Counts,
    Demand,
    Refused,
    Statement,
)

logger = logging.getLogger("ray.serve")

_PREFIX = "voice-clone:limits"
_TIMEOUT_S = 1.0
_MAX_CONNECTIONS = 16
#: How long routers then decide by themselves before Redis is asked again.
_AWAY_S = 1.0
#: Life of a slot that nobody renews.
_SLOT_S = 3.0
_RENEW_EVERY_S = 1.0
#: ``limits`` keeps an entry for each unit. Larger limits are counted in larger units, rounded up.
_MAX_ENTRIES = 10_000

#: KEYS: the sets. ARGV: life in seconds, the member, then the limit of each set. 0, or which set is full.
_TAKE_SLOTS = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
for i, key in ipairs(KEYS) do
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  if redis.call('ZCARD', key) >= tonumber(ARGV[2 + i]) then return i end
end
for _, key in ipairs(KEYS) do
  redis.call('ZADD', key, now + ARGV[1], ARGV[2])
  redis.call('EXPIRE', key, math.ceil(ARGV[1]))
end
return 0
"""
#: KEYS: a set. ARGV: life in seconds, then its members.
_RENEW_SLOTS = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[1]))
return 0
"""


class _Item(RateLimitItemPerMinute):
    """A limit whose window goes on when the limit is changed: the amount is no part of its key."""

    def key_for(self, *identifiers: bytes | str | int | float) -> str:
        return "/".join(str(identifier) for identifier in identifiers)


class RedisBudget:
    """Every decision asks Redis; one to three round trips."""

    def __init__(self, url: str) -> None:
        # Waits for a connection for as long as those before it need: a burst is no failure of Redis.
        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=None,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
        )
        # Of the clients `limits` can use, the one that is also asked for slots.
        self._storage = RedisStorage(
            f"async+{url}",
            implementation="redispy",
            key_prefix=_PREFIX,
            connection_pool=self._pool,  # type: ignore[arg-type] # documented, but missing in the signature
        )
        self._windows = MovingWindowRateLimiter(self._storage)
        self._redis = Redis(connection_pool=self._pool)
        self._take_slots = self._redis.register_script(_TAKE_SLOTS)
        self._renew_slots = self._redis.register_script(_RENEW_SLOTS)
        self._router = str(ULID())
        self._slots: dict[Account, set[str]] = {}
        self._own = Books(self._router, lends=False)
        self._away_until_s = float("-inf")
        self._renewing: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        #: What goes on at Redis, kept from being collected as garbage.
        self._pending: set[asyncio.Task[Any]] = set()

    async def take(self, demands: tuple[Demand, ...]) -> Refused | None:
        """Take all of ``demands``, or nothing and say why not."""
        # The client may swallow a cancellation: it must not reach it, and must be felt here.
        taking = asyncio.create_task(self._take_or_stand_in(demands))
        self._pending.add(taking)
        taking.add_done_callback(self._pending.discard)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(lambda done: self._undo(done, demands))
            raise

    def _undo(self, taking: asyncio.Task[Refused | None], demands: tuple[Demand, ...]) -> None:
        """Give back what was taken for a request that is gone."""
        if not taking.cancelled() and taking.exception() is None and taking.result() is None:
            self.give_back(demands)

    async def _take_or_stand_in(self, demands: tuple[Demand, ...]) -> Refused | None:
        slots = [demand for demand in demands if demand.account.counts is Counts.SLOTS]
        rates = [demand for demand in demands if demand.account.counts is not Counts.SLOTS]
        member = str(ULID())
        if time.monotonic() < self._away_until_s:
            return self._stand_in(demands, member)
        try:
            refused = await self._take(slots, rates, member)
        except (RedisError, OSError) as error:
            logger.warning("Redis is away (%s): this router holds the limits alone.", type(error).__name__)
            self._away_until_s = time.monotonic() + _AWAY_S
            # What was taken until now is not known; it ends by itself.
            return self._stand_in(demands, member)
        if refused is None:
            now_s = time.monotonic()
            self._own.forget(now_s)
            for account, units, _ in rates:
                self._own.record(account, units, now_s)
            self._hold(slots, member)
        return refused

    def give_back(self, demands: tuple[Demand, ...]) -> asyncio.Future[None]:
        """Give slots back. The future is done when other routers may have them."""
        freed = []
        for demand in demands:
            held = self._slots.get(demand.account)
            # Which one of an account is the same to everybody.
            if held:
                freed.append((demand.account, held.pop()))
                if not held:
                    del self._slots[demand.account]
        given = asyncio.create_task(self._free(freed))
        self._pending.add(given)
        given.add_done_callback(self._pending.discard)
        return given

    async def close(self) -> None:
        """Let go of connections and tasks."""
        self._closed.set()
        while self._pending:
            await asyncio.wait(self._pending)
        if self._renewing is not None:
            await self._renewing
        await self._pool.aclose()

    async def _take(self, slots: Sequence[Demand], rates: Sequence[Demand], member: str) -> Refused | None:
        if slots:
            full = await self._take_slots(
                keys=[_key(slot.account) for slot in slots],
                args=[_SLOT_S, member, *(slot.quota for slot in slots)],
            )
            if full:
                return Refused(slots[full - 1], 0, SLOT_RETRY_S)
        taken = False
        try:
            refused = await self._hit(rates)
            taken = refused is None
            return refused
        finally:
            if slots and not taken:
                await self._free([(slot.account, member) for slot in slots])

    async def _hit(self, rates: Sequence[Demand]) -> Refused | None:
        items = [(demand, *_item(demand)) for demand in rates]
        if len(items) > 1:
            # Nothing is taken from one limit where another refuses.
            for demand, item, cost in items:
                if not await self._windows.test(item, *demand.account, cost=cost):
                    return await self._refused(demand, item, cost)
        for demand, item, cost in items:
            if not await self._windows.hit(item, *demand.account, cost=cost):
                return await self._refused(demand, item, cost)
        return None

    async def _refused(self, demand: Demand, item: _Item, cost: int) -> Refused:
        """The refusal, with the time at which the entry leaves that is in the way."""
        key = self._storage.bridge.prefixed_key(item.key_for(*demand.account))
        entry = await self._redis.lindex(key, item.amount - cost)
        retry_after_s = max(0.0, float(entry) + WINDOW_S - time.time()) if entry else 0.0
        stats = await self._windows.get_window_stats(item, *demand.account)
        return Refused(demand, stats.remaining * demand.quota // item.amount, retry_after_s)

    def _hold(self, slots: Sequence[Demand], member: str) -> None:
        for slot in slots:
            self._slots.setdefault(slot.account, set()).add(member)
        if slots and self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        # Not ended by cancelling it: the client may swallow that.
        while not self._closed.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_RENEW_EVERY_S):
                    await self._closed.wait()
            for account, members in list(self._slots.items()):
                sent = set(members)
                with suppress(RedisError, OSError):
                    await self._renew_slots(keys=[_key(account)], args=[_SLOT_S, *sent])
                    # Given back while they were renewed.
                    gone = sent - self._slots.get(account, set())
                    if gone:
                        await self._redis.zrem(_key(account), *gone)

    async def _free(self, slots: Sequence[tuple[Account, str]]) -> None:
        # A slot that cannot be given back ends by itself.
        with suppress(RedisError, OSError):
            for account, member in slots:
                await self._redis.zrem(_key(account), member)

    def _stand_in(self, demands: tuple[Demand, ...], member: str) -> Refused | None:
        held = {account: len(members) for account, members in self._slots.items()}
        statement = Statement(self._router, self._router, held, asks=(Ask(demands),))
        decision = self._own.answer(statement, time.monotonic()).decisions[0]
        if isinstance(decision, Refused):
            return decision
        self._hold([demand for demand in demands if demand.account.counts is Counts.SLOTS], member)
        return None


def _key(account: Account) -> str:
    return ":".join((_PREFIX, *account))


def _item(demand: Demand) -> tuple[_Item, int]:
    """The limit as ``limits`` counts it, and what the demand costs of it."""
    amount = min(demand.quota, _MAX_ENTRIES)
    return _Item(amount), -(-demand.units * amount // demand.quota)

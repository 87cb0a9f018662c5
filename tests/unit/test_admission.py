"""Limits: exact windows, leases that never add up to more, slots that come back, what clients see."""

from __future__ import annotations

import asyncio
import pickle
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import ApiKey, LimitSettings
from serve_app.errors import InputTooLong, Overloaded, RateLimited, TooManyAtOnce, VoiceCloneError
from serve_app.ingress.problems import install_error_handlers
from serve_app.protocol import UNKNOWN_ADDRESS, Caller
from serve_app.router.limits import budget
from serve_app.router.limits.admission import Admission
from serve_app.router.limits.budget import (
    LEASE_S,
    ROUTER_LOST_S,
    WINDOW_S,
    Account,
    Answer,
    Ask,
    AskAgain,
    Books,
    Counts,
    Decision,
    Demand,
    Granted,
    Refused,
    Scope,
    Spent,
    Statement,
)
from serve_app.router.limits.leases import BooksAway, LeasedBudget, SharedBooks
from serve_app.router.limits.purse import STATE_EVERY_S, Purse

REQUESTS = Account(Counts.REQUESTS, Scope.IP, "10.0.0.1")
SLOTS = Account(Counts.SLOTS, Scope.IP, "10.0.0.1")


def request_of(quota: int, units: int = 1, account: Account = REQUESTS) -> tuple[Demand, ...]:
    return (Demand(account, units, quota),)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Routers:
    """Purses over shared books, without any waiting: each question is asked and answered in one step."""

    def __init__(self, count: int, *, lends: bool = True) -> None:
        self.now_s = 0.0
        self.books = Books("books", lends=lends)
        self.purses = [Purse(f"router-{number}") for number in range(count)]
        #: What was let in: account -> (time, units).
        self.let_in: dict[Account, list[tuple[float, int]]] = defaultdict(list)
        self.asked = 0

    def state(self, router: int, asks: Sequence[Ask] = ()) -> Answer:
        purse = self.purses[router]
        statement = purse.statement("books", asks, self.now_s)
        answer = self.books.answer(statement, self.now_s)
        purse.accept(statement, answer, self.now_s)
        self.asked += 1
        return answer

    def take(self, router: int, demands: tuple[Demand, ...], waited_s: float = 0.0) -> Decision:
        decision = self._take(router, demands, waited_s)
        if isinstance(decision, Granted):
            for account, units, _ in demands:
                self.let_in[account].append((self.now_s, units))
        return decision

    def _take(self, router: int, demands: tuple[Demand, ...], waited_s: float) -> Decision:
        if refused := self.purses[router].refusal(demands, self.now_s):
            return refused
        if self.purses[router].spend(demands, self.now_s):
            return Granted()
        return self.state(router, [Ask(demands, waited_s)]).decisions[0]

    def pass_time(self, seconds: float, *, dead: Sequence[int] = ()) -> None:
        """Time goes by; routers state what they hold when it is due."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + STATE_EVERY_S / 2)
            for number, purse in enumerate(self.purses):
                due_s = purse.state_by_s
                if number not in dead and due_s is not None and due_s <= self.now_s:
                    self.state(number)

    def most_in_a_window(self, account: Account) -> int:
        times = self.let_in[account]
        return max(
            (sum(units for at_s, units in times if start <= at_s < start + WINDOW_S) for start, _ in times),
            default=0,
        )


def granted(decision: object) -> bool:
    return isinstance(decision, Granted)


def test_one_router_uses_the_whole_limit_and_no_more() -> None:
    routers = Routers(1)
    assert all(granted(routers.take(0, request_of(100))) for _ in range(100))
    assert isinstance(routers.take(0, request_of(100)), Refused)
    assert routers.asked < 60


def test_many_requests_of_a_high_limit_cost_few_questions() -> None:
    routers = Routers(2)
    assert all(granted(routers.take(number % 2, request_of(10_000))) for number in range(2_000))
    assert routers.asked < 2_000 / 6


def test_refusal_says_when_and_is_right() -> None:
    routers = Routers(1)
    for _ in range(10):
        assert granted(routers.take(0, request_of(10)))
        routers.pass_time(1.0)
    refused = routers.take(0, request_of(10))
    assert isinstance(refused, Refused)
    assert refused.retry_after_s == pytest.approx(50.0)
    routers.pass_time(refused.retry_after_s - 0.125)
    assert isinstance(routers.take(0, request_of(10)), Refused)
    routers.pass_time(0.125)
    assert granted(routers.take(0, request_of(10)))
    assert isinstance(routers.take(0, request_of(10)), Refused)


def test_refusals_of_a_full_window_ask_nobody() -> None:
    routers = Routers(1)
    while granted(routers.take(0, request_of(5))):
        routers.pass_time(1.0)
    asked = routers.asked
    assert not any(granted(routers.take(0, request_of(5))) for _ in range(1000))
    assert routers.asked == asked


def test_a_long_text_waits_until_enough_has_left_the_window() -> None:
    characters = Account(Counts.CHARACTERS, Scope.TOTAL, "")
    routers = Routers(1)
    for _ in range(4):
        assert granted(routers.take(0, request_of(1000, 250, characters)))
        routers.pass_time(10.0)
    refused = routers.take(0, request_of(1000, 500, characters))
    assert isinstance(refused, Refused)
    assert refused.retry_after_s == pytest.approx(30.0)
    assert refused.remaining == 0


def test_what_another_router_leased_and_did_not_spend_is_waited_for() -> None:
    routers = Routers(2)
    assert granted(routers.take(0, request_of(100)))
    let_in = 1
    while granted(decision := routers.take(1, request_of(100))):
        let_in += 1
    assert isinstance(decision, AskAgain)
    routers.pass_time(STATE_EVERY_S)
    while granted(decision := routers.take(1, request_of(100))):
        let_in += 1
    assert isinstance(decision, Refused)
    assert let_in == 100


def test_a_router_leaves_enough_for_the_others() -> None:
    routers = Routers(4)
    for number in range(4):
        assert granted(routers.take(number, request_of(100)))
    # All hold leases now; whoever asks gets what nobody holds.
    assert sum(granted(routers.take(3, request_of(100))) for _ in range(100)) > 60


def test_leases_of_a_killed_router_count_as_spent() -> None:
    routers = Routers(2)
    assert granted(routers.take(0, request_of(100)))
    routers.pass_time(LEASE_S, dead=[0])
    let_in = 0
    while granted(decision := routers.take(1, request_of(100))):
        let_in += 1
    assert isinstance(decision, Refused)
    assert 100 - 1 - 100 // budget.LEASE_SHARE <= let_in < 100


def test_all_limits_of_a_request_or_none() -> None:
    routers = Routers(1)
    both = (Demand(REQUESTS, 1, 10), Demand(Account(Counts.CHARACTERS, Scope.TOTAL, ""), 60, 100))
    assert granted(routers.take(0, both))
    refused = routers.take(0, both)
    assert isinstance(refused, Refused)
    assert refused.demand.account.counts is Counts.CHARACTERS
    assert sum(granted(routers.take(0, request_of(10))) for _ in range(20)) == 9


def test_a_changed_limit_holds_at_once() -> None:
    routers = Routers(1)
    assert granted(routers.take(0, request_of(1000)))
    assert isinstance(routers.take(0, request_of(1)), Refused)
    assert granted(routers.take(0, request_of(2)))
    assert isinstance(routers.take(0, request_of(2)), Refused)
    assert granted(routers.take(0, request_of(1000)))


def test_a_changed_limit_on_slots_holds_at_once() -> None:
    routers = Routers(1)
    assert granted(routers.take(0, request_of(100, account=SLOTS)))
    assert isinstance(routers.take(0, request_of(1, account=SLOTS)), Refused)


def test_slots_are_given_back() -> None:
    routers = Routers(2)
    demands = request_of(3, account=SLOTS)
    assert [granted(routers.take(number % 2, demands)) for number in range(4)] == [True, True, True, False]
    assert routers.purses[1].release(demands)
    routers.state(1)
    assert granted(routers.take(0, demands))
    assert isinstance(routers.take(1, demands), Refused)


def test_slots_lent_ahead_are_waited_for() -> None:
    routers = Routers(2)
    demands = request_of(16, account=SLOTS)
    assert granted(routers.take(0, demands))
    while granted(decision := routers.take(1, demands)):
        pass
    assert isinstance(decision, AskAgain)
    routers.pass_time(STATE_EVERY_S)
    assert granted(routers.take(1, demands, waited_s=0.3))
    assert isinstance(routers.take(1, demands, waited_s=0.3), Refused)
    assert len(routers.let_in[SLOTS]) == 16


def test_slots_of_a_killed_router_come_back() -> None:
    routers = Routers(2)
    demands = request_of(2, account=SLOTS)
    assert granted(routers.take(0, demands))
    assert granted(routers.take(0, demands))
    routers.pass_time(ROUTER_LOST_S - 1.0, dead=[0])
    assert isinstance(routers.take(1, demands), Refused)
    routers.pass_time(1.0, dead=[0])
    assert granted(routers.take(1, demands))


def test_slots_of_a_busy_router_do_not_end() -> None:
    routers = Routers(2)
    demands = request_of(1, account=SLOTS)
    assert granted(routers.take(0, demands))
    routers.pass_time(10 * ROUTER_LOST_S)
    assert isinstance(routers.take(1, demands), Refused)


def test_idle_subjects_are_forgotten() -> None:
    routers = Routers(1)
    for number in range(500):
        routers.take(0, request_of(100, account=REQUESTS._replace(subject=str(number))))
    assert len(routers.books) == 500
    routers.pass_time(WINDOW_S + LEASE_S)
    routers.state(0)
    assert len(routers.books) == 0
    assert routers.purses[0].state_by_s is None


def test_a_flood_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_ACCOUNTS", 100)
    routers = Routers(1)
    assert granted(routers.take(0, request_of(1, account=SLOTS)))
    for number in range(10_000):
        routers.take(0, request_of(100, account=REQUESTS._replace(subject=str(number))))
        if number % 50 == 0:
            routers.pass_time(STATE_EVERY_S)
    assert len(routers.books) <= 100
    assert isinstance(routers.take(0, request_of(1, account=SLOTS)), Refused)


def test_what_was_spent_from_a_lease_counts_from_then_on() -> None:
    routers = Routers(2)
    assert granted(routers.take(0, request_of(100)))
    routers.now_s = 1.0
    assert all(granted(routers.take(0, request_of(100))) for _ in range(8))
    assert routers.asked == 1
    routers.now_s = 1.5
    routers.state(0)
    # The first request has left the window, the eight from the lease have not.
    routers.now_s = 60.5
    while granted(routers.take(1, request_of(100), waited_s=LEASE_S)):
        pass
    assert len(routers.let_in[REQUESTS]) == 9 + 92
    assert routers.most_in_a_window(REQUESTS) == 100


def test_what_is_booked_late_leaves_a_window_late() -> None:
    window = budget.Window()
    window.add(10.0, 1)
    window.add(9.9, 1)
    window.drop_old(10.0 + WINDOW_S - 0.05)
    assert window.total == 2


def test_memory_of_a_window_is_bounded() -> None:
    window = budget.Window()
    for number in range(100_000):
        window.add(number * WINDOW_S / 100_000, 1)
    assert len(window.history(WINDOW_S)) <= WINDOW_S / budget.TICK_S + 1
    window.drop_old(WINDOW_S + budget.TICK_S)
    assert 99_000 < window.total < 100_000


ROUTER = st.integers(0, 2)
STEP = st.one_of(
    st.tuples(st.just("take"), ROUTER, st.integers(1, 7)),
    st.tuples(st.just("take"), ROUTER, st.just(1)),
    # Until it is refused: whatever another router still spends then is too much.
    st.tuples(st.just("fill"), ROUTER, st.just(1)),
    # In eighths of a second: within a lease's life, and about a window's.
    st.tuples(st.just("wait"), ROUTER, st.integers(1, 24)),
    st.tuples(st.just("wait"), ROUTER, st.integers(456, 488)),
    st.tuples(st.just("state"), ROUTER, st.just(0)),
    st.tuples(st.just("lose"), ROUTER, st.just(0)),
)


@given(limit=st.integers(8, 80), steps=st.lists(STEP, min_size=5, max_size=30))
@settings(max_examples=1000, deadline=None)
def test_no_window_holds_more_than_the_limit(limit: int, steps: list[tuple[str, int, int]]) -> None:
    """Whatever three routers do and in whatever order, also if they fall silent or do not hear back."""
    routers = Routers(3)
    for name, router, number in steps:
        if name == "wait":
            # Not through pass_time: statements may be late, or never come.
            routers.now_s += number / 8
        elif name == "state":
            routers.state(router)
        elif name == "lose":
            # The books hear of it, the router does not hear back.
            lost = routers.purses[router].statement("books", [Ask(request_of(limit))], routers.now_s)
            routers.books.answer(lost, routers.now_s)
        elif name == "take":
            routers.take(router, request_of(limit, number), waited_s=LEASE_S)
        else:
            while granted(routers.take(router, request_of(limit), waited_s=LEASE_S)):
                pass
    assert routers.most_in_a_window(REQUESTS) <= limit


@given(steps=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 16)), max_size=100))
@settings(max_examples=200, deadline=None)
def test_no_more_slots_are_in_use_than_the_limit(steps: list[tuple[int, bool, int]]) -> None:
    routers = Routers(3)
    limit = 20
    in_use = [0, 0, 0]
    for router, takes, eighths in steps:
        routers.pass_time(eighths / 8)
        demands = request_of(limit, account=SLOTS)
        if takes:
            in_use[router] += granted(routers.take(router, demands, waited_s=LEASE_S))
        elif in_use[router]:
            in_use[router] -= 1
            if routers.purses[router].release(demands):
                routers.state(router)
        assert sum(in_use) <= limit
    for router, used in enumerate(in_use):
        for _ in range(used):
            routers.purses[router].release(request_of(limit, account=SLOTS))
    routers.pass_time(1.0)
    assert sum(granted(routers.take(0, request_of(limit, account=SLOTS))) for _ in range(30)) == limit


class FakeRemote:
    """Shared books that can be taken away and replaced."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.books: Books | None = Books("first")
        self.calls = 0

    async def answer(self, statement: Statement) -> Answer:
        await asyncio.sleep(0)
        self.calls += 1
        if self.books is None:
            raise BooksAway("gone")
        return self.books.answer(statement, self.clock())

    async def introduce(self, router: str, history: Sequence[Spent]) -> None:
        if self.books is None:
            raise BooksAway("gone")
        self.books.introduce(router, history, self.clock())


def budgets(clock: Clock, remote: FakeRemote, count: int) -> list[LeasedBudget]:
    return [
        LeasedBudget(name, SharedBooks(name, remote, clock).answer, clock)
        for name in (f"router-{number}" for number in range(count))
    ]


async def let_in(budget: LeasedBudget, demands: tuple[Demand, ...], tries: int) -> int:
    return sum([await budget.take(demands) is None for _ in range(tries)])


async def test_requests_at_once_share_a_question() -> None:
    clock = Clock()
    remote = FakeRemote(clock)
    (one,) = budgets(clock, remote, 1)
    answers = await asyncio.gather(*(one.take(request_of(100)) for _ in range(150)))
    assert sum(answer is None for answer in answers) == 100
    assert remote.calls <= 3
    await one.close()


async def test_a_request_that_is_cancelled_while_it_asks_holds_nothing() -> None:
    clock = Clock()
    remote = FakeRemote(clock)
    (one,) = budgets(clock, remote, 1)
    demands = request_of(1, account=SLOTS)
    for yields in range(6):
        asking = asyncio.create_task(one.take(demands))
        for _ in range(yields):
            await asyncio.sleep(0)
        finished = asking.done()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        if finished:
            await one.give_back(demands)
        for _ in range(10):
            await asyncio.sleep(0)
        assert await one.take(demands) is None, yields
        await one.give_back(demands)
    await one.close()


async def test_without_books_each_router_allows_its_share() -> None:
    clock = Clock()
    remote = FakeRemote(clock)
    routers = budgets(clock, remote, 2)
    for router in routers:
        assert await let_in(router, request_of(100), 1) == 1
    # The first hears of the second with its next statement.
    assert await let_in(routers[0], request_of(5, account=SLOTS), 1) == 1
    remote.books = None
    clock.now_s += 3.0
    assert await let_in(routers[0], request_of(100), 100) == 49
    refused = await routers[0].take(request_of(100))
    assert refused is not None
    assert refused.demand.quota == 100
    # Asked once, not for each request.
    assert remote.calls < 15
    for router in routers:
        await router.close()


async def test_new_books_are_told_what_was_spent() -> None:
    clock = Clock()
    remote = FakeRemote(clock)
    (one,) = budgets(clock, remote, 1)
    assert await let_in(one, request_of(20), 15) == 15
    remote.books = Books("second")
    clock.now_s += 3.0
    assert await let_in(one, request_of(20), 20) == 5
    await one.close()


async def test_slots_survive_the_books() -> None:
    clock = Clock()
    remote = FakeRemote(clock)
    (one,) = budgets(clock, remote, 1)
    demands = request_of(3, account=SLOTS)
    assert await let_in(one, demands, 2) == 2
    remote.books = Books("second")
    assert await let_in(one, demands, 3) == 1
    await one.close()


class OwnBooks(LeasedBudget):
    """A budget over books of its own."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("router", SharedBooks("router", FakeRemote(clock), clock).answer, clock)


def key(**quota: Any) -> ApiKey:
    return ApiKey(sha256="0" * 64, **quota)


@pytest.mark.parametrize(
    ("caller", "allowed", "policy"),
    [
        (Caller("10.0.0.1"), 2, "requests-per-ip"),
        (Caller("10.0.0.1", "small"), 3, "requests-per-key"),
        (Caller("10.0.0.1", "default"), 4, "requests-per-key"),
        (Caller("10.0.0.1", "not configured"), 2, "requests-per-ip"),
        (Caller(), 6, "requests"),
        (Caller(UNKNOWN_ADDRESS), 6, "requests"),
    ],
)
async def test_who_is_limited_by_what(caller: Caller, allowed: int, policy: str) -> None:
    limits = LimitSettings.model_validate(
        {
            "total": {"requests_per_minute": 6},
            "per_key": {"requests_per_minute": 4},
            "per_ip": {"requests_per_minute": 2},
        }
    )
    admission = Admission(limits, {"small": key(requests_per_minute=3), "default": key()}, OwnBooks(Clock()))
    for _ in range(allowed):
        async with admission.admit(caller, 10):
            pass
    with pytest.raises(RateLimited) as refused:
        async with admission.admit(caller, 10):
            pass
    assert refused.value.limit is not None
    assert refused.value.limit.policy == policy
    assert refused.value.retry_after_s == pytest.approx(60.0)
    await admission.close()


async def test_slots_are_held_for_the_length_of_the_context_however_it_ends() -> None:
    limits = LimitSettings.model_validate({"total": {"concurrent": 3}, "per_ip": {"concurrent": 1}})
    admission = Admission(limits, {}, OwnBooks(Clock()))
    one, other = Caller("10.0.0.1"), Caller("10.0.0.2")
    for _ in range(5):
        async with admission.admit(one, 1), admission.admit(other, 1), admission.admit(Caller(), 1):
            with pytest.raises(TooManyAtOnce):
                await admission.admit(one, 1).__aenter__()
            with pytest.raises(Overloaded):
                await admission.admit(Caller(), 1).__aenter__()
        with pytest.raises(ZeroDivisionError):
            async with admission.admit(one, 1):
                raise ZeroDivisionError
    await admission.close()


async def test_characters_count_and_a_text_over_the_limit_is_not_told_to_wait() -> None:
    limits = LimitSettings.model_validate({"per_ip": {"characters_per_minute": 100}})
    admission = Admission(limits, {}, OwnBooks(Clock()))
    caller = Caller("10.0.0.1")
    async with admission.admit(caller, 60):
        pass
    with pytest.raises(RateLimited) as refused:
        async with admission.admit(caller, 60):
            pass
    assert refused.value.limit is not None
    assert (refused.value.limit.counts, refused.value.limit.remaining) == ("characters", 40)
    with pytest.raises(InputTooLong):
        async with admission.admit(caller, 101):
            pass
    async with admission.admit(caller, 40):
        pass
    await admission.close()


async def test_reconfigured_limits_hold_at_once() -> None:
    admission = Admission(LimitSettings(), {}, OwnBooks(Clock()))
    caller = Caller("10.0.0.1")
    for _ in range(3):
        async with admission.admit(caller, 1):
            pass
    admission.reconfigure(LimitSettings.model_validate({"per_ip": {"requests_per_minute": 3}}))
    with pytest.raises(RateLimited):
        async with admission.admit(caller, 1):
            pass
    admission.reconfigure(LimitSettings.model_validate({"per_ip": {"requests_per_minute": 4}}))
    async with admission.admit(caller, 1):
        pass
    await admission.close()


async def refusal(quota: dict[str, Any]) -> VoiceCloneError:
    admission = Admission(LimitSettings.model_validate({"per_ip": quota}), {}, OwnBooks(Clock()))
    caller = Caller("10.0.0.1")
    async with admission.admit(caller, 10):
        with pytest.raises(VoiceCloneError) as refused:
            await admission.admit(caller, 10).__aenter__()
    await admission.close()
    return refused.value


@pytest.mark.parametrize(
    ("quota", "code", "headers"),
    [
        (
            {"requests_per_minute": 1},
            "rate_limit_exceeded",
            {
                "Retry-After": "60",
                "RateLimit-Policy": '"requests-per-ip";q=1;w=60',
                "RateLimit": '"requests-per-ip";r=0;t=60',
                "x-ratelimit-limit-requests": "1",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "60s",
            },
        ),
        (
            {"characters_per_minute": 15},
            "rate_limit_exceeded",
            {"RateLimit-Policy": '"characters-per-ip";q=15;w=60', "x-ratelimit-remaining-characters": "5"},
        ),
        (
            {"concurrent": 1},
            "concurrency_limit_exceeded",
            {
                "Retry-After": "1",
                "RateLimit-Policy": '"concurrent-per-ip";q=1;qu="concurrent-requests"',
                "RateLimit": '"concurrent-per-ip";r=0',
            },
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/audio/speech", "/api/synthesize"])
async def test_refusal_on_the_wire(
    quota: dict[str, Any], code: str, headers: dict[str, str], path: str
) -> None:
    error = pickle.loads(pickle.dumps(await refusal(quota)))  # noqa: S301 - as between deployments
    api = FastAPI()
    install_error_handlers(api)

    @api.get(path)
    async def refuse() -> None:
        raise error

    answer = TestClient(api).get(path)
    assert answer.status_code == 429
    assert {name: answer.headers[name] for name in headers} == headers
    assert "x-should-retry" not in answer.headers
    body = answer.json()
    assert (body["code"] if path.startswith("/api") else body["error"]["code"]) in (
        code,
        "RATE_LIMIT_EXCEEDED",
    )

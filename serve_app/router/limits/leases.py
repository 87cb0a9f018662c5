"""LeasedBudget: one router's part of the shared books, and what it does while they are away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

from serve_app.router.detached import start_detached
from serve_app.router.limits.budget import (
    Answer,
    Ask,
    Books,
    Counts,
    Decision,
    Demand,
    Granted,
    Refused,
    Spent,
    Statement,
)
from serve_app.router.limits.purse import Purse

logger = logging.getLogger("ray.serve")

#: Books that do not answer for this long are away.
_ANSWER_TIMEOUT_S = 1.0
#: How long the router then decides by itself before it asks again.
_AWAY_S = 1.0


class BooksAway(Exception):
    """The shared books cannot be reached."""


class RemoteBooks(Protocol):
    """The shared books, wherever they are kept. Methods raise ``BooksAway``."""

    async def answer(self, statement: Statement) -> Answer:
        """See ``Books.answer``."""

    async def introduce(self, router: str, history: Sequence[Spent]) -> None:
        """See ``Books.introduce``."""


class SharedBooks:
    """The shared books, with a stand-in for the time they are away.

    The stand-in allows this router its share of every limit, counted over what it spent itself. So the door
    is neither shut nor open: with N routers at most 2 - 1/N of a limit passes within a window, if all of it
    had gone through one router before. Books that are new are told what was spent before they were opened.
    """

    def __init__(self, router: str, remote: RemoteBooks, clock: Callable[[], float] = time.monotonic) -> None:
        self._router = router
        self._remote = remote
        self._clock = clock
        self._own = Books(router, lends=False)
        self._routers = 1
        self._away_until_s = float("-inf")

    async def answer(self, statement: Statement) -> Answer:
        """The shared books' answer, or the stand-in's."""
        now_s = self._clock()
        self._own.forget(now_s)
        for account, age_s, units in statement.spent:
            self._own.record(account, units, now_s - age_s)
        if now_s >= self._away_until_s:
            try:
                async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                    answer = await self._ask(statement)
            except (BooksAway, TimeoutError) as error:
                logger.warning(
                    "The actor that keeps the limits is away (%s); this router allows 1/%d of each.",
                    str(error) or "no answer",
                    self._routers,
                )
            else:
                self._routers = max(1, answer.routers)
                self._note(statement.asks, answer)
                return answer
            self._away_until_s = self._clock() + _AWAY_S
        return self._stand_in(statement)

    async def _ask(self, statement: Statement) -> Answer:
        answer = await self._remote.answer(statement)
        while not answer.known:
            await self._remote.introduce(self._router, self._own.history(self._clock()))
            answer = await self._remote.answer(replace(statement, books=answer.books))
        return answer

    def _note(self, asks: Sequence[Ask], answer: Answer) -> None:
        now_s = self._clock()
        for ask, decision in zip(asks, answer.decisions, strict=True):
            if isinstance(decision, Granted):
                for account, units, _ in ask.demands:
                    if account.counts is not Counts.SLOTS:
                        self._own.record(account, units, now_s)

    def _stand_in(self, statement: Statement) -> Answer:
        shares = [
            ask._replace(
                demands=tuple(
                    demand._replace(quota=max(1, demand.quota // self._routers)) for demand in ask.demands
                )
            )
            for ask in statement.asks
        ]
        own = replace(statement, books=self._router, returned=(), spent=(), asks=tuple(shares))
        answer = self._own.answer(own, self._clock())
        decisions = tuple(
            _as_asked(decision, ask) for ask, decision in zip(statement.asks, answer.decisions, strict=True)
        )
        # The name of the shared books stays: they may have been away and lost nothing.
        return replace(answer, books=statement.books, decisions=decisions)


def _as_asked(decision: Decision, ask: Ask) -> Decision:
    """A refusal names the limit, not this router's share of it."""
    if not isinstance(decision, Refused):
        return decision
    account = decision.demand.account
    return decision._replace(demand=next(demand for demand in ask.demands if demand.account == account))


class _Waiting(NamedTuple):
    demands: tuple[Demand, ...]
    since_s: float
    decided: asyncio.Future[Decision]


class LeasedBudget:
    """Decides most requests from leases, the others with one question to the books at a time for all."""

    def __init__(
        self,
        router: str,
        books: Callable[[Statement], Awaitable[Answer]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._books = books
        self._clock = clock
        self._purse = Purse(router)
        self._books_name = ""
        self._waiting: list[_Waiting] = []
        #: Who waits for the next statement to have arrived.
        self._stated: list[asyncio.Future[None]] = []
        self._wake = asyncio.Event()
        self._talking: asyncio.Task[None] | None = None

    async def take(self, demands: tuple[Demand, ...]) -> Refused | None:
        """Take all of ``demands``, or nothing and say why not."""
        since_s = self._clock()
        while True:
            now_s = self._clock()
            if refused := self._purse.refusal(demands, now_s):
                return refused
            if self._purse.spend(demands, now_s):
                return None
            decision = await self._ask(demands, since_s)
            if isinstance(decision, Granted):
                return None
            if isinstance(decision, Refused):
                return decision
            await asyncio.sleep(decision.after_s)

    def give_back(self, demands: tuple[Demand, ...]) -> asyncio.Future[None]:
        """Give slots back. The future is done when other routers may have them."""
        known = asyncio.get_running_loop().create_future()
        if self._purse.release(demands):
            self._stated.append(known)
            self._wake.set()
        else:
            known.set_result(None)
        return known

    async def close(self) -> None:
        """Stop talking to the books. What is held comes back to them by itself."""
        if self._talking is not None:
            self._talking.cancel()
            with suppress(asyncio.CancelledError):
                await self._talking

    async def _ask(self, demands: tuple[Demand, ...], since_s: float) -> Decision:
        waiting = _Waiting(demands, since_s, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wake.set()
        if self._talking is None:
            self._talking = start_detached(self._talk())
        try:
            return await waiting.decided
        except asyncio.CancelledError:
            # Decided in the same moment: nobody else knows that the slots are held.
            decided = waiting.decided
            if not decided.cancelled() and decided.done() and isinstance(decided.result(), Granted):
                self.give_back(demands)
            raise

    async def _talk(self) -> None:
        """Exchange statements and answers while there is anything to say."""
        while True:
            if not self._waiting and not self._stated:
                state_by_s = self._purse.state_by_s
                wait_s = None if state_by_s is None else max(0.0, state_by_s - self._clock())
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
            self._wake.clear()
            state_by_s = self._purse.state_by_s
            if self._waiting or self._stated or (state_by_s is not None and state_by_s <= self._clock()):
                await self._exchange()

    async def _exchange(self) -> None:
        waiting = [one for one in self._waiting if not one.decided.cancelled()]
        stated, self._waiting, self._stated = self._stated, [], []
        sent_s = self._clock()
        asks = [Ask(one.demands, sent_s - one.since_s) for one in waiting]
        statement = self._purse.statement(self._books_name, asks, sent_s)
        try:
            answer = await self._books(statement)
            self._books_name = answer.books
            self._purse.accept(statement, answer, sent_s)
        except Exception as error:
            # Not reached by any known way. Whoever waits gets the defect, the next exchange its chance.
            logger.exception("Defect in the exchange with the books of limits")
            for one in waiting:
                if not one.decided.done():
                    one.decided.set_exception(error)
            return
        finally:
            for known in stated:
                if not known.done():
                    known.set_result(None)
        for one, decision in zip(waiting, answer.decisions, strict=True):
            if not one.decided.cancelled():
                one.decided.set_result(decision)
            elif isinstance(decision, Granted):
                self.give_back(one.demands)

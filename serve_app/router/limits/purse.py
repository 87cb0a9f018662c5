"""What one router may spend by itself: leases from the books, and slots it holds. Pure, like the books."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from serve_app.router.limits.budget import (
    LEASE_S,
    WINDOW_S,
    Account,
    Answer,
    Ask,
    Counts,
    Demand,
    Granted,
    Refused,
    Spent,
    Statement,
)

#: While a router holds anything, it states so this often: returns leases, shows that it lives.
STATE_EVERY_S = 0.25
#: Refusals remembered, so that a flood is refused without asking the books.
_MAX_REFUSALS = 1_000


@dataclass(slots=True)
class _Lease:
    quota: int
    units: int
    ends_s: float
    spent: list[tuple[float, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Slots:
    quota: int
    in_use: int = 0
    #: In use when last stated, and granted since.
    stated: int = 0
    #: Lent ahead.
    ahead: int = 0


@dataclass(slots=True)
class _Refusal:
    refused: Refused
    until_s: float


class Purse:
    """Leases and slots of one router. Times are seconds of its own monotonic clock."""

    def __init__(self, router: str) -> None:
        self._router = router
        self._leases: dict[Account, _Lease] = {}
        self._slots: dict[Account, _Slots] = {}
        self._refusals: dict[Account, _Refusal] = {}
        self._stated_s = float("-inf")

    def spend(self, demands: Sequence[Demand], now_s: float) -> bool:
        """Take everything from what is held, or nothing. False if the books must be asked."""
        if not all(self._covers(demand, now_s) for demand in demands):
            return False
        for account, units, _ in demands:
            if account.counts is Counts.SLOTS:
                self._slots[account].in_use += units
            else:
                lease = self._leases[account]
                lease.units -= units
                lease.spent.append((now_s, units))
        return True

    def _covers(self, demand: Demand, now_s: float) -> bool:
        account, units, quota = demand
        # What was lent under another limit is not used: a limit that is changed holds at once.
        if account.counts is Counts.SLOTS:
            slots = self._slots.get(account)
            return (
                slots is not None
                and slots.quota == quota
                and slots.in_use + units <= slots.stated + slots.ahead
            )
        lease = self._leases.get(account)
        return lease is not None and lease.quota == quota and lease.units >= units and now_s < lease.ends_s

    def refusal(self, demands: Sequence[Demand], now_s: float) -> Refused | None:
        """The refusal the books would repeat: nothing leaves a window before its time."""
        for demand in demands:
            known = self._refusals.get(demand.account)
            if known is None:
                continue
            if known.until_s <= now_s:
                del self._refusals[demand.account]
            elif demand.quota == known.refused.demand.quota and demand.units >= known.refused.demand.units:
                return known.refused._replace(demand=demand, retry_after_s=known.until_s - now_s)
        return None

    def release(self, demands: Iterable[Demand]) -> bool:
        """Give slots back. True if others may be waiting for them: then the books should hear of it now."""
        scarce = False
        for account, units, _ in demands:
            if account.counts is Counts.SLOTS:
                slots = self._slots[account]
                # Nothing is lent ahead where the limit is near, or low.
                scarce |= not slots.ahead
                slots.in_use -= units
        return scarce

    @property
    def state_by_s(self) -> float | None:
        """When the next statement is due; None while nothing is held."""
        return self._stated_s + STATE_EVERY_S if self._leases or self._slots else None

    def statement(self, books: str, asks: Sequence[Ask], now_s: float) -> Statement:
        """Everything the books should know. Leases in it are over: what is asked for, and what is old."""
        asked = {demand.account for ask in asks for demand in ask.demands}
        returned = [
            account
            for account, lease in self._leases.items()
            if account in asked or lease.ends_s - LEASE_S + STATE_EVERY_S <= now_s
        ]
        spent = [
            Spent(account, now_s - at_s, units)
            for account in returned
            for at_s, units in self._leases.pop(account).spent
        ]
        self._slots = {account: slots for account, slots in self._slots.items() if slots.in_use}
        for slots in self._slots.values():
            slots.stated, slots.ahead = slots.in_use, 0
        self._stated_s = now_s
        return Statement(
            self._router,
            books,
            {account: slots.in_use for account, slots in self._slots.items()},
            tuple(returned),
            tuple(spent),
            tuple(asks),
        )

    def accept(self, statement: Statement, answer: Answer, sent_s: float) -> None:
        """Take what an answer grants and lends. ``sent_s``: when the statement it answers was made."""
        quotas: dict[Account, int] = {}
        for ask, decision in zip(statement.asks, answer.decisions, strict=True):
            if isinstance(decision, Granted):
                for account, units, quota in ask.demands:
                    quotas[account] = quota
                    if account.counts is Counts.SLOTS:
                        slots = self._slots.setdefault(account, _Slots(quota))
                        slots.quota = quota
                        slots.in_use += units
                        slots.stated += units
            elif isinstance(decision, Refused):
                self._remember(decision, sent_s)
        for account, units in answer.leases.items():
            if account.counts is Counts.SLOTS:
                self._slots[account].ahead = units
            else:
                # From before the books lent it: ours ends before theirs.
                self._leases[account] = _Lease(quotas[account], units, sent_s + LEASE_S)

    def _remember(self, refused: Refused, now_s: float) -> None:
        if refused.demand.account.counts is Counts.SLOTS or refused.retry_after_s >= WINDOW_S:
            return
        if len(self._refusals) >= _MAX_REFUSALS:
            self._refusals = {
                account: refusal for account, refusal in self._refusals.items() if refusal.until_s > now_s
            }
        if len(self._refusals) < _MAX_REFUSALS:
            self._refusals[refused.demand.account] = _Refusal(refused, now_s + refused.retry_after_s)

"""The books of what callers used: moving windows and slots, shared by all routers. Pure: no Ray, no clock.

A router does not ask for every request. It *leases* a few units ahead and spends them by itself; the books
count a lease as used until the router says what became of it. Three rules keep the sum of all routers within
the limit, in every window of 60 s:

- units are granted only if what is in the window, what is leased and what is granted fit into the limit;
- a spent unit is booked when it was spent or later, never earlier: so it leaves the window late, if at all;
- a lease that is not accounted for before it ends is booked as spent in full at its end.

Errors are on the strict side: units leased and not used count until they are returned, and units spent
within ``TICK_S`` of each other leave the window together.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

WINDOW_S = 60.0
#: Resolution of a window: bounds its memory to 240 entries.
TICK_S = 0.25
#: Life of a lease. The router gives it back well before, see ``purse.STATE_EVERY_S``.
LEASE_S = 2.0
#: A router not heard of for this long is dead: its slots are free again.
ROUTER_LOST_S = 3.0
#: A lease holds what was asked for this many times over, and at most this share of what is left: one router
#: leaves enough for the others, and near the limit there are no leases at all.
LEASE_TIMES = 8
LEASE_SHARE = 8
#: Guess of when a slot becomes free; a speech takes seconds.
SLOT_RETRY_S = 1.0
#: How long to wait for other routers to return leases before asking again.
ASK_AGAIN_S = 0.1
#: Accounts kept. Beyond, those idle longest are forgotten: a flood of addresses is the total limit's to stop.
MAX_ACCOUNTS = 50_000


class Counts(StrEnum):
    """What a limit counts."""

    REQUESTS = "requests"
    CHARACTERS = "characters"
    SLOTS = "concurrent"


class Scope(StrEnum):
    """Over whom a limit counts."""

    TOTAL = "total"
    KEY = "key"
    IP = "ip"


class Account(NamedTuple):
    """One counter: what is counted, over whom, and for which of them."""

    counts: Counts
    scope: Scope
    subject: str


class Demand(NamedTuple):
    """Units a request needs of an account, and the limit that holds for it now."""

    account: Account
    units: int
    quota: int


class Refused(NamedTuple):
    """The demand that cannot be met; ``retry_after_s`` from now it could."""

    demand: Demand
    remaining: int
    retry_after_s: float


class AskAgain(NamedTuple):
    """Other routers hold enough unspent: ask again, when they have returned it."""

    after_s: float


class Granted(NamedTuple):
    """All demands are met and booked."""


Decision = Granted | Refused | AskAgain


class Ask(NamedTuple):
    """What one request needs: all of it or nothing."""

    demands: tuple[Demand, ...]
    #: Since when it has been asked for; nobody's lease is waited for longer than ``LEASE_S``.
    waited_s: float = 0.0


class Spent(NamedTuple):
    """Units used some time ago. An age, because clocks of two machines do not compare."""

    account: Account
    age_s: float
    units: int


@dataclass(frozen=True, slots=True)
class Statement:
    """What a router holds and wants. Complete each time, so that a lost one does no harm."""

    router: str
    #: The books it was last answered from; empty for the first.
    books: str
    #: Slots in use. All others this router held are free.
    slots: Mapping[Account, int] = field(default_factory=dict)
    #: Leases that end with this statement.
    returned: tuple[Account, ...] = ()
    #: What was spent from them.
    spent: tuple[Spent, ...] = ()
    asks: tuple[Ask, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The books' answer to a statement."""

    #: These books. A router that named others is not answered: it must first tell these what it spent.
    books: str
    known: bool
    #: Routers heard of within a window.
    routers: int
    decisions: tuple[Decision, ...] = ()
    #: Units the router may spend by itself: slots until its next statement, others for ``LEASE_S``.
    leases: Mapping[Account, int] = field(default_factory=dict)


class Window:
    """Units used within the last ``WINDOW_S``."""

    __slots__ = ("_entries", "total")

    def __init__(self) -> None:
        # [first use, last use, units]; uses within a tick are one entry, which ends with its last.
        self._entries: deque[list[float]] = deque()
        self.total = 0

    def add(self, at_s: float, units: int) -> None:
        """Book units. What comes late is booked as of the newest entry."""
        entries = self._entries
        self.total += units
        if entries:
            at_s = max(at_s, entries[-1][1])
            if at_s - entries[-1][0] < TICK_S:
                entries[-1][1] = at_s
                entries[-1][2] += units
                return
        entries.append([at_s, at_s, units])

    def drop_old(self, now_s: float) -> None:
        """Forget what has left the window."""
        entries = self._entries
        while entries and entries[0][1] + WINDOW_S <= now_s:
            self.total -= int(entries.popleft()[2])

    def free_in_s(self, now_s: float, units: int) -> float:
        """Seconds until ``units`` will have left the window; a whole window if they are not all in it."""
        for _, last_s, used in self._entries:
            units -= int(used)
            if units <= 0:
                return last_s + WINDOW_S - now_s
        return WINDOW_S

    def history(self, now_s: float) -> list[tuple[float, int]]:
        """Ages and units of what is in the window, oldest first."""
        return [(now_s - last_s, int(units)) for _, last_s, units in self._entries]


@dataclass(slots=True)
class _Lease:
    units: int
    ends_s: float


@dataclass(slots=True)
class _Held:
    in_use: int
    ahead: int = 0


class _Book:
    """One account: a window for what is counted per minute, slots for what is counted at once."""

    __slots__ = ("leases", "quota", "slots", "window")

    def __init__(self) -> None:
        self.window = Window()
        self.leases: dict[str, _Lease] = {}
        self.slots: dict[str, _Held] = {}
        #: Of the last demand: how many slots may be lent ahead.
        self.quota = 0

    def taken(self, now_s: float) -> int:
        """Units used, leased and held."""
        self.end_leases(now_s)
        self.window.drop_old(now_s)
        return (
            self.window.total
            + sum(lease.units for lease in self.leases.values())
            + sum(held.in_use + held.ahead for held in self.slots.values())
        )

    def end_leases(self, now_s: float) -> None:
        """Book leases nobody accounted for as spent at their end."""
        ended = sorted(
            (lease.ends_s, router) for router, lease in self.leases.items() if lease.ends_s <= now_s
        )
        for ends_s, router in ended:
            self.window.add(ends_s, self.leases.pop(router).units)

    def ahead_elsewhere(self, router: str) -> int:
        """Units other routers hold and may not need."""
        return sum(lease.units for name, lease in self.leases.items() if name != router) + sum(
            held.ahead for name, held in self.slots.items() if name != router
        )

    @property
    def idle(self) -> bool:
        """True if nothing is booked, leased or held."""
        return not (self.window.total or self.leases or self.slots)


class Books:
    """All accounts. Times are seconds of one monotonic clock, of the caller's choice."""

    def __init__(self, name: str, *, lends: bool = True) -> None:
        self._name = name
        self._lends = lends
        # Ordered by last use, so that what is idle is found without looking at everything.
        self._books: OrderedDict[Account, _Book] = OrderedDict()
        self._heard_s: dict[str, float] = {}
        self._slots_of: dict[str, set[Account]] = {}

    def __len__(self) -> int:
        return len(self._books)

    def answer(self, statement: Statement, now_s: float) -> Answer:
        """Book what a router spent and holds, then decide what it asks for, in order."""
        router = statement.router
        if statement.books != self._name:
            return Answer(self._name, known=False, routers=len(self._heard_s))
        self._heard_s[router] = now_s
        self.forget(now_s)
        ended = {account for account in statement.returned if self._end_lease(account, router, now_s)}
        for spent in statement.spent:
            # What comes after the lease's end has been booked as spent already.
            if spent.account in ended:
                self.record(spent.account, spent.units, now_s - spent.age_s)
        self._state_slots(router, statement.slots)
        decisions = tuple(self._decide(router, ask, now_s) for ask in statement.asks)
        leases = self._lend(router, statement, decisions, now_s) if self._lends else {}
        return Answer(self._name, known=True, routers=len(self._heard_s), decisions=decisions, leases=leases)

    def introduce(self, router: str, history: Sequence[Spent], now_s: float) -> None:
        """Take over what a router spent when other books were kept."""
        self._heard_s[router] = now_s
        for spent in history:
            self.record(spent.account, spent.units, now_s - spent.age_s)

    def record(self, account: Account, units: int, at_s: float) -> None:
        """Book units that were spent."""
        self._book(account).window.add(at_s, units)

    def history(self, now_s: float) -> list[Spent]:
        """Everything in the windows."""
        spent = []
        for account, book in self._books.items():
            book.window.drop_old(now_s)
            spent += [Spent(account, age_s, units) for age_s, units in book.window.history(now_s)]
        return spent

    def _end_lease(self, account: Account, router: str, now_s: float) -> bool:
        book = self._books.get(account)
        if book is None:
            return False
        book.end_leases(now_s)
        return book.leases.pop(router, None) is not None

    def _state_slots(self, router: str, stated: Mapping[Account, int]) -> None:
        for account in self._slots_of.pop(router, set()) - stated.keys():
            self._books[account].slots.pop(router, None)
        if stated:
            self._slots_of[router] = set(stated)
        for account, in_use in stated.items():
            self._book(account).slots[router] = _Held(in_use)

    def _decide(self, router: str, ask: Ask, now_s: float) -> Decision:
        refusals: list[Refused] = []
        hopeless: list[Refused] = []
        for demand in ask.demands:
            account, units, quota = demand
            book = self._books.get(account)
            free = quota - (book.taken(now_s) if book else 0)
            if free >= units:
                continue
            if account.counts is Counts.SLOTS or book is None:
                retry_after_s = SLOT_RETRY_S
            else:
                retry_after_s = book.window.free_in_s(now_s, units - free)
            # What others hold ahead is not used yet.
            free += book.ahead_elsewhere(router) if book else 0
            refused = Refused(demand, max(0, free), retry_after_s)
            refusals.append(refused)
            if free < units:
                hopeless.append(refused)
        if refusals:
            if not hopeless and ask.waited_s < LEASE_S:
                return AskAgain(ASK_AGAIN_S)
            return max(hopeless or refusals, key=lambda refused: refused.retry_after_s)
        for account, units, quota in ask.demands:
            book = self._book(account)
            book.quota = quota
            if account.counts is Counts.SLOTS:
                book.slots.setdefault(router, _Held(0)).in_use += units
                self._slots_of.setdefault(router, set()).add(account)
            else:
                # Where a lease should have been returned and was not, it is worth nothing to its holder.
                if lease := book.leases.pop(router, None):
                    book.window.add(now_s, lease.units)
                book.window.add(now_s, units)
        return Granted()

    def _lend(
        self, router: str, statement: Statement, decisions: Sequence[Decision], now_s: float
    ) -> dict[Account, int]:
        """Leases for what was granted, and for all slots in use."""
        wanted: dict[Account, tuple[int, int]] = {}
        for ask, decision in zip(statement.asks, decisions, strict=True):
            if isinstance(decision, Granted):
                for account, units, quota in ask.demands:
                    wanted[account] = (max(units, wanted.get(account, (0, 0))[0]), quota)
        for account in self._slots_of.get(router, ()):
            wanted.setdefault(account, (1, self._books[account].quota))
        leases = {}
        for account, (units, quota) in wanted.items():
            book = self._books[account]
            ahead = min(units * LEASE_TIMES, (quota - book.taken(now_s)) // LEASE_SHARE)
            if ahead <= 0:
                continue
            leases[account] = ahead
            if account.counts is Counts.SLOTS:
                book.slots[router].ahead = ahead
            else:
                book.leases[router] = _Lease(ahead, now_s + LEASE_S)
        return leases

    def _book(self, account: Account) -> _Book:
        book = self._books.get(account)
        if book is None:
            book = self._books[account] = _Book()
            while len(self._books) > MAX_ACCOUNTS:
                self._drop_oldest()
        else:
            self._books.move_to_end(account)
        return book

    def _drop_oldest(self) -> None:
        account, book = self._books.popitem(last=False)
        for router in book.slots:
            self._slots_of[router].discard(account)

    def forget(self, now_s: float) -> None:
        """Free the slots of lost routers, and drop accounts that have been idle for a window."""
        for router, heard_s in list(self._heard_s.items()):
            if heard_s + ROUTER_LOST_S <= now_s:
                self._state_slots(router, {})
            if heard_s + WINDOW_S <= now_s:
                del self._heard_s[router]
        while self._books:
            oldest = next(iter(self._books.values()))
            oldest.end_leases(now_s)
            oldest.window.drop_old(now_s)
            if not oldest.idle:
                break
            self._books.popitem(last=False)

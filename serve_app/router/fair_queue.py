"""A queue that shares a scarce engine fairly between clients.

Rows wait in tiers; a lower tier is served first. Within a tier the client that has been served least goes
first, counted in cost over weight: stride scheduling (C. Waldspurger and W. Weihl, "Stride Scheduling:
Deterministic Proportional-Share Resource Management", MIT 1995). However much one client has queued, the next
row of another waits for at most one row of each client before it.

Pure data structure: no clock, no event loop. Every operation takes O(log clients).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count, islice
from typing import Generic, Protocol, TypeVar

#: How far ``take`` looks for a row it may take: rows of one client, and clients of one tier. More would make
#: one call slow when nothing fits; what is overlooked is found by the next call.
_ROWS_LOOKED_AT = 16
_CLIENTS_LOOKED_AT = 64
#: Clients known before those that wait for nothing are looked for.
_CLIENTS_KEPT = 128


class Tier(IntEnum):
    """Which rows go first."""

    #: Lost with its replica: a listener hears silence until it is spoken again.
    REDO = 0
    #: First utterance of an interactive request: somebody waits for a sign of life.
    FIRST = 1
    #: Later utterance of an interactive request.
    NEXT = 2
    BULK_FIRST = 3
    BULK_NEXT = 4


class Queued(Protocol):
    """What a row has to say about itself; ``tier`` may change only while the row is not queued."""

    @property
    def client(self) -> str:
        """Who is charged."""

    @property
    def weight(self) -> float:
        """Share of that client, above zero; 2.0 is served twice as often as 1.0."""

    @property
    def cost(self) -> float:
        """What serving the row takes, above zero, in any unit."""

    @property
    def tier(self) -> Tier:
        """Where it waits."""


Row = TypeVar("Row", bound=Queued)


@dataclass(slots=True, eq=False)
class _Client(Generic[Row]):
    name: str
    #: Cost over weight served so far: who has least goes first.
    served: float
    tiers: dict[Tier, OrderedDict[int, Row]] = field(
        default_factory=lambda: {tier: OrderedDict() for tier in Tier}
    )
    #: Tiers in whose heap the client stands.
    standing: set[Tier] = field(default_factory=set)

    @property
    def waits(self) -> bool:
        """True if any row is queued."""
        return any(self.tiers.values())


class FairQueue(Generic[Row]):
    """Rows of all clients. ``len`` is the number queued."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client[Row]] = {}
        self._heaps: dict[Tier, list[tuple[float, int, _Client[Row]]]] = {tier: [] for tier in Tier}
        self._counts = dict.fromkeys(Tier, 0)
        self._order = count()
        #: What the client served last had been served before: a newcomer starts here, not at zero.
        self._served = 0.0
        self._prune_at = _CLIENTS_KEPT

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[Row]:
        for client in self._clients.values():
            for rows in client.tiers.values():
                yield from rows.values()

    def waiting(self, *tiers: Tier) -> int:
        """How many rows wait in ``tiers``."""
        return sum(self._counts[tier] for tier in tiers)

    def put(self, row: Row) -> None:
        """Queue ``row`` behind the others of its client and tier."""
        client = self._clients.get(row.client)
        if client is None:
            self._prune()
            client = self._clients[row.client] = _Client(row.client, self._served)
        elif not client.waits:
            # Who has waited for nothing has no claim to what others were served meanwhile.
            client.served = max(client.served, self._served)
        client.tiers[row.tier][id(row)] = row
        self._counts[row.tier] += 1
        self._stand(client, row.tier)

    def remove(self, row: Row) -> bool:
        """Take ``row`` out unserved and uncharged; False if it is not queued."""
        client = self._clients.get(row.client)
        if client is None or client.tiers[row.tier].pop(id(row), None) is None:
            return False
        self._counts[row.tier] -= 1
        self._tidy(client)
        return True

    def take(self, accept: Callable[[Row], bool]) -> Row | None:
        """The row that is next among those ``accept`` agrees to, taken out and charged; None if none is."""
        for tier in Tier:
            if self._counts[tier] and (row := self._take_from(tier, accept)) is not None:
                return row
        return None

    def _take_from(self, tier: Tier, accept: Callable[[Row], bool]) -> Row | None:
        heap = self._heaps[tier]
        passed_over: list[_Client[Row]] = []
        found: Row | None = None
        while heap and found is None and len(passed_over) < _CLIENTS_LOOKED_AT:
            served, _, client = heapq.heappop(heap)
            client.standing.discard(tier)
            rows = client.tiers[tier]
            if not rows:
                continue
            if served < client.served:
                # Served in another tier since it came to stand here.
                self._stand(client, tier)
                continue
            passed_over.append(client)
            found = next((row for row in islice(rows.values(), _ROWS_LOOKED_AT) if accept(row)), None)
            if found is not None:
                del rows[id(found)]
                self._counts[tier] -= 1
                self._served = max(self._served, client.served)
                client.served += found.cost / found.weight
        for client in passed_over:
            if client.tiers[tier]:
                self._stand(client, tier)
            self._tidy(client)
        return found

    def _stand(self, client: _Client[Row], tier: Tier) -> None:
        if tier not in client.standing:
            client.standing.add(tier)
            heapq.heappush(self._heaps[tier], (client.served, next(self._order), client))

    def _tidy(self, client: _Client[Row]) -> None:
        """Forget clients that wait for nothing, unless they are ahead of their share."""
        if not len(self):
            self._clients.clear()
            for heap in self._heaps.values():
                heap.clear()
        elif not client.waits and client.served <= self._served:
            self._clients.pop(client.name, None)

    def _prune(self) -> None:
        """Forget clients whose lead others have caught up with; now and then, so that it costs nothing."""
        if len(self._clients) >= self._prune_at:
            for client in list(self._clients.values()):
                if not client.waits and client.served <= self._served:
                    del self._clients[client.name]
            self._prune_at = max(_CLIENTS_KEPT, 2 * len(self._clients))

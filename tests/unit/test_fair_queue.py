"""Who is next: shares by weight, tiers, newcomers, and the cost of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.router.fair_queue import FairQueue, Tier

_numbers = count()


@dataclass(eq=False)
class Item:
    """A row as the queue sees it."""

    client: str
    cost: float = 10.0
    weight: float = 1.0
    tier: Tier = Tier.FIRST
    number: int = field(default_factory=lambda: next(_numbers))


def everything(queue: FairQueue[Item]) -> list[Item]:
    """All rows in the order they are served."""
    served = []
    while (item := queue.take(lambda _: True)) is not None:
        served.append(item)
    return served


def filled(*items: Item) -> FairQueue[Item]:
    """A queue with these rows put in order."""
    queue: FairQueue[Item] = FairQueue()
    for item in items:
        queue.put(item)
    return queue


def test_one_client_is_served_in_order() -> None:
    items = [Item("a") for _ in range(5)]
    assert everything(filled(*items)) == items


def test_two_hundred_queued_rows_are_no_head_start() -> None:
    greedy = [Item("greedy") for _ in range(200)]
    late = [Item("late") for _ in range(3)]
    served = everything(filled(*greedy, *late))
    assert [served.index(item) for item in late] == [1, 3, 5]


def test_newcomer_gets_no_credit_for_what_it_missed() -> None:
    queue = filled(*(Item("old") for _ in range(100)))
    for _ in range(50):
        queue.take(lambda _: True)
    for _ in range(10):
        queue.put(Item("new"))
    next_ten = [queue.take(lambda _: True) for _ in range(10)]
    assert sum(item is not None and item.client == "new" for item in next_ten) == 5


def test_pausing_saves_nothing_up() -> None:
    queue = filled(Item("pauses"), *(Item("steady") for _ in range(100)))
    for _ in range(50):
        queue.take(lambda _: True)
    for _ in range(10):
        queue.put(Item("pauses"))
    next_ten = [queue.take(lambda _: True) for _ in range(10)]
    assert sum(item is not None and item.client == "pauses" for item in next_ten) == 5


@given(
    weights=st.lists(st.floats(0.5, 8.0), min_size=2, max_size=5),
    costs=st.lists(st.floats(1.0, 300.0), min_size=60, max_size=60),
)
def test_shares_follow_the_weights(weights: list[float], costs: list[float]) -> None:
    items = [
        Item(str(client), cost=cost, weight=weight) for cost in costs for client, weight in enumerate(weights)
    ]
    queue = filled(*items)
    served = [0.0] * len(weights)
    # As long as everyone has rows left, nobody is further from its share than one row.
    for _ in range(40):
        item = queue.take(lambda _: True)
        assert item is not None
        served[int(item.client)] += item.cost / item.weight
    assert max(served) - min(served) <= 2 * 300.0 / min(weights)


@pytest.mark.parametrize(("sooner", "later"), list(zip(Tier, list(Tier)[1:], strict=False)))
def test_lower_tiers_go_first(sooner: Tier, later: Tier) -> None:
    behind, ahead = Item("a", tier=later), Item("b", tier=sooner)
    assert everything(filled(behind, ahead)) == [ahead, behind]


def test_service_in_one_tier_counts_in_the_others() -> None:
    first = [Item("a") for _ in range(4)]
    following = [Item("a", tier=Tier.NEXT), Item("b", tier=Tier.NEXT)]
    assert everything(filled(*first, *following))[-2:] == following[::-1]


def test_what_is_not_accepted_stays() -> None:
    one, two, three = Item("a", cost=1), Item("a", cost=2), Item("b", cost=3)
    queue = filled(one, two, three)
    assert queue.take(lambda item: item.cost > 1) in (two, three)
    assert queue.take(lambda item: item.cost > 9) is None
    assert len(queue) == 2
    assert len(everything(queue)) == 2


def test_removed_rows_are_neither_served_nor_charged() -> None:
    gone = [Item("a", cost=1000) for _ in range(3)]
    stays, other = Item("a"), Item("b")
    queue = filled(*gone, stays, other)
    assert all(queue.remove(item) for item in gone)
    assert not queue.remove(gone[0])
    assert everything(queue) == [stays, other]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(list(Tier)), st.booleans())))
def test_nothing_is_lost_and_nothing_comes_twice(script: list[tuple[str, Tier, bool]]) -> None:
    queue: FairQueue[Item] = FairQueue()
    put: list[Item] = []
    taken: list[Item] = []
    for client, tier, takes in script:
        item = Item(client, tier=tier)
        put.append(item)
        queue.put(item)
        if takes and (served := queue.take(lambda _: True)) is not None:
            taken.append(served)
    assert len(queue) == len(put) - len(taken)
    assert set(queue) == set(put) - set(taken)
    taken += everything(queue)
    assert sorted(item.number for item in taken) == sorted(item.number for item in put)
    assert queue.waiting(*Tier) == 0


def test_idle_clients_are_forgotten() -> None:
    queue: FairQueue[Item] = FairQueue()
    queue.put(Item("stays"))
    for number in range(10_000):
        queue.put(Item(f"passer-by {number}"))
        queue.take(lambda item: item.client != "stays")
        queue.put(Item("busy", cost=1000))
        queue.take(lambda item: item.client == "busy")
    assert len(queue) == 1
    assert len(queue._clients) < 1000

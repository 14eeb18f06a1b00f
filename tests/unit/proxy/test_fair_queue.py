"""The queue's order: priority, then fairness between keys by the work they ask for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.fair_queue import FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    found = []
    while (ticket := queue.first()) is not None:
        queue.leave(ticket, served=True)
        found.append(ticket.item)
    return found


def test_one_key_is_served_in_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abc":
        queue.push(b"k", 0, 10, name)
    assert drained(queue) == ["a", "b", "c"]
    assert len(queue) == 0


def test_a_flood_waits_behind_itself() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(5):
        queue.push(b"flood", 0, 10, f"f{i}")
    queue.push(b"other", 0, 10, "o0")
    queue.push(b"other", 0, 10, "o1")
    assert drained(queue) == ["f0", "o0", "f1", "o1", "f2", "f3", "f4"]


def test_large_requests_get_as_much_work_done_as_small_ones() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(2):
        queue.push(b"large", 0, 100, f"L{i}")
    for i in range(12):
        queue.push(b"small", 0, 10, f"s{i}")
    order = drained(queue)
    assert order.index("L1") == 11  # behind the first ten small ones, which cost as much as L0


def test_a_smaller_priority_goes_first() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push(b"a", 0, 1, "plain")
    queue.push(b"a", 5, 1, "late")
    queue.push(b"b", -1, 1, "urgent")
    assert drained(queue) == ["urgent", "plain", "late"]


def test_who_left_is_not_served_and_not_counted() -> None:
    queue: FairQueue[str] = FairQueue()
    first = queue.push(b"a", 0, 100, "gone")
    queue.push(b"a", 0, 1, "stays")
    queue.push(b"b", 0, 1, "other")
    queue.leave(first, served=False)
    queue.leave(first, served=False)
    assert len(queue) == 2
    assert sorted(drained(queue)) == ["other", "stays"]


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(-2, 2), st.integers(1, 50), st.booleans())))
def test_everyone_is_served_once_or_has_left(pushes: list[tuple[bytes, int, int, bool]]) -> None:
    queue: FairQueue[int] = FairQueue()
    leavers = []
    for i, (key, priority, cost, leaves) in enumerate(pushes):
        ticket = queue.push(key, priority, cost, i)
        if leaves:
            leavers.append(ticket)
    for ticket in leavers:
        queue.leave(ticket, served=False)
    served = []
    while (first := queue.first()) is not None:
        served.append(first.item)
        queue.leave(first, served=True)
    assert sorted(served) == [i for i, push in enumerate(pushes) if not push[3]]
    assert [pushes[i][1] for i in served] == sorted(pushes[i][1] for i in served)
    assert len(queue) == 0

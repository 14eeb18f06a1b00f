from __future__ import annotations

from collections import Counter

from proxy.scheduling.random_choice import RandomChoice
from tests.unit.proxy.scheduling.fleet import NothingMayBeAsked, fleet


def test_all_alike_whatever_their_load() -> None:
    some = fleet(4)
    some[0].load.reserve(10**6)
    policy = RandomChoice("prefill", seed=1)
    counts = Counter(policy.pick(some, 1, NothingMayBeAsked()).key for _ in range(4000))
    assert all(850 < counts[one.key] < 1150 for one in some), counts


def test_two_processes_draw_differently() -> None:
    some = fleet(8)
    one, other = RandomChoice("prefill"), RandomChoice("prefill")
    draws = [[policy.pick(some, 1, NothingMayBeAsked()).key for _ in range(50)] for policy in (one, other)]
    assert draws[0] != draws[1]

from __future__ import annotations

from collections import Counter

from proxy.scheduling.power_of_two import PowerOfTwo
from tests.unit.proxy.scheduling.fleet import NothingMayBeAsked, fleet


def test_of_two_the_better_one() -> None:
    a, b = fleet(2)
    a.load.reserve(1000)
    policy = PowerOfTwo("prefill", seed=1)
    assert all(policy.pick([a, b], 100, NothingMayBeAsked()) is b for _ in range(50))


def test_only_the_worst_of_all_is_never_picked() -> None:
    some = fleet(4)
    for number, one in enumerate(some):
        one.load.reserve(1000 * (number + 1))
    policy = PowerOfTwo("prefill", seed=1)
    counts = Counter(policy.pick(some, 100, NothingMayBeAsked()).key for _ in range(3000))
    # Of 6 pairs the best is in 3, the second wins 2, the third 1: two different ones are drawn.
    assert [round(counts[one.key] / 500) for one in some] == [3, 2, 1, 0]

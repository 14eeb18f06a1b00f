from __future__ import annotations

from engine_adapter.cluster.backoff import Backoff


def test_delays_double_up_to_the_longest() -> None:
    backoff = Backoff(first_s=1, max_s=10, reset_after_s=60)
    assert [backoff.died(now=0, healthy_since=None) for _ in range(6)] == [1, 2, 4, 8, 10, 10]


def test_a_long_healthy_time_begins_anew_a_short_one_does_not() -> None:
    backoff = Backoff(first_s=1, max_s=10, reset_after_s=60)
    backoff.died(now=0, healthy_since=None)
    assert backoff.died(now=100, healthy_since=41) == 2
    assert backoff.died(now=200, healthy_since=140) == 1


def test_it_never_overflows() -> None:
    backoff = Backoff(num_deaths=10_000)
    assert backoff.died(now=0, healthy_since=None) == backoff.max_s

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.load_ledger import SPEED_SPREAD, UNKNOWN_SPEED, InstanceLoad, settle_speeds


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 3)), max_size=30))
def test_whatever_is_reserved_comes_back_once(jobs: list[tuple[int, int]]) -> None:
    load = InstanceLoad()
    held = [(load.reserve(num_tokens), times) for num_tokens, times in jobs]
    assert load.num_requests == len(jobs) and load.num_tokens == sum(num for num, _ in jobs)
    for reservation, times in held:
        for _ in range(times):
            reservation.release()
    left = [num for num, times in jobs if not times]
    assert (load.num_requests, load.num_tokens) == (len(left), sum(left))
    for reservation, _ in held:
        reservation.release()
    assert (load.num_requests, load.num_tokens) == (0, 0)
    assert load.total_requests == len(jobs)


def test_a_reservation_knows_what_was_ahead_of_it() -> None:
    load = InstanceLoad()
    load.reserve(10)
    assert load.reserve(5).ahead == 10


def test_speed_follows_measurements() -> None:
    load = InstanceLoad()
    assert load.speed == UNKNOWN_SPEED
    load.observe(1000, 1.0)
    assert load.speed == 1000
    for _ in range(50):
        load.observe(2000, 1.0)
    assert 1990 < load.speed <= 2000
    load.observe(1, 0.0)  # a clock that did not move must not divide by zero


def test_a_fleet_stays_comparable() -> None:
    fast, slow, unknown = InstanceLoad(), InstanceLoad(), InstanceLoad()
    fast.observe(100_000, 1)
    slow.observe(10, 1)
    settle_speeds([fast, slow, unknown], drift=0.0)
    mean = (100_000 + 10) / 2
    assert unknown.speed == mean
    assert slow.speed == mean / SPEED_SPREAD
    for _ in range(1000):
        settle_speeds([fast, slow, unknown], drift=0.05)
    assert abs(fast.speed / slow.speed - 1) < 0.01  # an outdated difference is forgotten
    untouched = InstanceLoad()
    settle_speeds([untouched], drift=0.5)
    assert untouched.speed == UNKNOWN_SPEED

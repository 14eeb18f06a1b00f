from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.load_ledger import SPEED_SPREAD, UNKNOWN_SPEED, Hold, InstanceLoad, settle_speeds


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


def test_speed_is_of_sums_so_a_short_piece_of_work_says_little() -> None:
    load = InstanceLoad()
    for _ in range(10):
        load.observe(10_000, 1.0)
        load.observe(64, 0.064)  # a tenth of the speed, in a sixteenth of the time
    assert 9_000 < load.speed < 10_000


def test_work_in_a_queue_counts_from_the_end_of_what_was_before_it() -> None:
    """Three prompts sent at once to an instance of 1000 tokens/s, one after the other; then a pause; then another."""
    load = InstanceLoad()
    for tokens, began, now in ((1000, 0.0, 1.0), (3000, 0.0, 4.0), (500, 0.0, 4.5), (2000, 60.0, 62.0)):
        load.observe_queue(tokens, began, now)
        assert abs(load.speed - 1000) < 1e-6


def test_prompts_that_end_with_one_step_share_its_time() -> None:
    load = InstanceLoad()
    for step in range(1, 41):
        for _ in range(4):
            load.observe_queue(250, step - 1.0, float(step))
    assert 900 < load.speed < 1200


def test_only_an_idle_instance_drifts_and_goes_on_from_there() -> None:
    idle, busy, slow = InstanceLoad(), InstanceLoad(), InstanceLoad()
    for load, speed in ((idle, 500), (busy, 500), (slow, 2000)):
        load.observe(speed, 1.0)
    held = busy.reserve(10)
    settle_speeds([idle, busy, slow], drift=0.1)
    assert idle.speed == 550 and busy.speed == 500
    idle.observe(1, 1e-3)  # one small measurement does not bring the forgotten one back
    assert 545 < idle.speed < 560
    held.release()


def test_a_hold_is_given_back_once_and_exactly() -> None:
    load = InstanceLoad()
    holds = [Hold(load, amount) for amount in (3, 10**15, 7)]
    assert load.policy_load == 10**15 + 10
    for hold in (*holds, *holds):
        hold.release()
    assert load.policy_load == 0 and load.num_requests == 0

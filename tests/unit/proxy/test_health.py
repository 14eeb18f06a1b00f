from __future__ import annotations

from proxy.health import FIRST_BACK_OFF_S, MAX_BACK_OFF_S, Health


def test_it_takes_consecutive_failures_to_go_out() -> None:
    health = Health(max_failures=2)
    assert not health.failed(0.0, "refused")
    health.succeeded()
    assert not health.failed(1.0, "refused")
    assert health.healthy
    assert health.failed(2.0, "refused again")
    assert not health.healthy and health.last_error == "refused again"


def test_one_trial_is_let_in_after_the_back_off() -> None:
    health = Health(max_failures=1)
    health.failed(0.0, "x")
    assert not health.may_try(FIRST_BACK_OFF_S - 0.01)
    assert health.may_try(FIRST_BACK_OFF_S)
    health.begin_trial(FIRST_BACK_OFF_S)
    assert not health.may_try(FIRST_BACK_OFF_S + 0.01)
    assert health.succeeded()
    assert health.may_try(0.0) and not health.succeeded()


def test_the_back_off_grows_to_a_bound_and_starts_anew() -> None:
    health = Health(max_failures=1)
    waits = []
    for _ in range(8):
        health.failed(0.0, "x")
        waits.append(health.retry_at)
    assert waits[:3] == [1.0, 2.0, 4.0] and waits[-1] == MAX_BACK_OFF_S
    health.succeeded()
    health.failed(0.0, "x")
    assert health.retry_at == FIRST_BACK_OFF_S


def test_requests_that_fail_count_once_each_and_only_in_a_row() -> None:
    health = Health(max_failures=2, max_request_failures=3)
    for _ in range(9):
        assert not health.request_failed(0.0, "500", "poisoned")
    assert health.healthy and health.num_request_failures == 1
    assert not health.request_failed(0.0, "500", "a")
    health.answered()
    assert not health.doubted
    assert [health.request_failed(0.0, "500", name) for name in "bcd"] == [False, False, True]
    assert not health.healthy and health.last_error == "500"


def test_an_instance_that_fails_at_requests_comes_back_by_a_request_only() -> None:
    health = Health(max_request_failures=1)
    assert health.request_failed(0.0, "500", "a")
    assert not health.succeeded() and not health.healthy  # a probe proves that it can be reached
    assert health.may_try(FIRST_BACK_OFF_S)
    health.begin_trial(FIRST_BACK_OFF_S)
    assert not health.request_failed(FIRST_BACK_OFF_S, "500", "b")
    assert not health.may_try(FIRST_BACK_OFF_S * 2) and health.may_try(FIRST_BACK_OFF_S * 3)
    assert health.answered() and health.healthy and not health.doubted


def test_a_probe_brings_back_what_could_not_be_reached_and_leaves_the_count_of_requests() -> None:
    health = Health(max_failures=1, max_request_failures=2)
    health.request_failed(0.0, "500", "a")
    assert health.failed(0.0, "refused")
    assert health.succeeded() and health.healthy and health.doubted
    assert health.request_failed(0.0, "500", "b")


def test_an_instance_that_died_of_its_requests_comes_back_by_a_probe() -> None:
    """Its death failed the requests it had; what answers probes after refusals is another process."""
    health = Health(max_failures=2, max_request_failures=2)
    assert [health.request_failed(0.0, "reset", name) for name in "ab"] == [False, True]
    assert not health.failed(0.5, "refused")
    assert not health.succeeded(), "one refusal in a row is none"
    for at in range(20):
        health.failed(1.0 + at, "refused")
    assert health.succeeded() and health.healthy and health.may_try(21.0)
    assert health.request_failed(21.0, "500", "c"), "what failed before is forgotten with a success only"
    assert not health.succeeded() and health.may_try(21.0 + FIRST_BACK_OFF_S)

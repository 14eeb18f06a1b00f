"""The table is walked completely."""

from __future__ import annotations

import itertools

import pytest

from proxy.errors import Failure
from proxy.retry import TABLE, Action, Budget, Evidence, Leg

MID_ANSWER = (Failure.LOST_MID_ANSWER, Failure.SILENT_MID_ANSWER, Failure.GARBAGE_MID_ANSWER)
INNOCENT = {  # what is not counted: it restarted, it is out already, it did answer, the client's or the KV's fault
    *MID_ANSWER,
    *(Failure.STALE, Failure.INSTANCE_OUT, Failure.CLIENT_ERROR, Failure.ERROR_EVENT, Failure.OUT_OF_TIME),
}
ALL = list(itertools.product(Leg, Failure))


def test_the_table_has_every_row() -> None:
    assert set(TABLE) == set(ALL)


@pytest.mark.parametrize(("leg", "failure"), ALL)
def test_every_row_obeys_the_rules(leg: Leg, failure: Failure) -> None:
    row = TABLE[leg, failure]
    assert 500 <= row.status <= 504
    if failure is Failure.CLIENT_ERROR:
        assert row.action is Action.PASS_ON  # a 4xx is the client's
    elif failure is Failure.OUT_OF_TIME:
        assert row.action in (Action.FAIL, Action.END_ANSWER)  # nobody has time for another attempt
    elif leg is Leg.PREFILL:
        assert row.action in (Action.OTHER_PREFILLER, Action.SAME_INSTANCE)
        assert (row.action is Action.SAME_INSTANCE) == (failure is Failure.STALE)
    elif failure in (Failure.REFUSED, Failure.CONNECT_TIMEOUT):
        assert row.action is Action.OTHER_DECODER  # it was never read: the KV is there still
    elif failure in MID_ANSWER:
        ended = failure is Failure.OUT_OF_TIME  # the others are continued, or ended where that is not exact
        assert row.action is (Action.END_ANSWER if ended else Action.CONTINUE)
    else:
        assert row.action is Action.PREFILL_AGAIN  # the KV may be gone
    assert (row.evidence is Evidence.CONNECTION) == (failure in (Failure.REFUSED, Failure.CONNECT_TIMEOUT))
    assert (row.evidence is Evidence.NONE) == (failure in INNOCENT)


@pytest.mark.parametrize(("leg", "failure"), ALL)
@pytest.mark.parametrize("attempts", [0, 1, 2, 3])
def test_attempts_are_bounded(leg: Leg, failure: Failure, attempts: int) -> None:
    budget = Budget(attempts, 0.0)
    made = {Leg.PREFILL: 0, Leg.DECODE: 0}

    def attempt(on: Leg) -> None:
        budget.spend(on)
        made[on] += 1

    attempt(Leg.PREFILL)
    if leg is Leg.DECODE:
        attempt(Leg.DECODE)
    while True:
        action, _ = budget.decide(leg, failure)
        if action in (Action.FAIL, Action.PASS_ON, Action.CONTINUE, Action.END_ANSWER):
            break
        if action is Action.PREFILL_AGAIN:
            attempt(Leg.PREFILL)
        attempt(leg)
    bound = max(1, attempts)
    assert made[Leg.PREFILL] <= bound and made[Leg.DECODE] <= bound
    if TABLE[leg, failure].action in (Action.PASS_ON, Action.CONTINUE, Action.END_ANSWER, Action.FAIL):
        assert budget.num_retries == 0
    else:
        assert made[leg] == bound


def test_the_delay_doubles_and_a_stale_connection_costs_none() -> None:
    budget = Budget(9, 0.5)
    assert [budget.decide(Leg.PREFILL, Failure.SERVER_ERROR)[1] for _ in range(3)] == [0.5, 1.0, 2.0]
    assert budget.decide(Leg.PREFILL, Failure.STALE) == (Action.SAME_INSTANCE, 0.0)

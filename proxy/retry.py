"""What follows from a failure: the whole table, and the budget that bounds it.

Two questions decide a row. Was the request read (a refused connection: certainly not)? Could the KV be gone (a decoder
that had the request may have pulled and released it)? A 4xx is the client's and is never retried.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from proxy.errors import Failure


class Leg(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Action(enum.StrEnum):
    SAME_INSTANCE = "same_instance"  # at once, on a fresh connection
    OTHER_PREFILLER = "other_prefiller"
    OTHER_DECODER = "other_decoder"  # with the KV there is
    PREFILL_AGAIN = "prefill_again"  # from scratch
    PASS_ON = "pass_on"  # the instance's own answer goes to the client
    CONTINUE = "continue"  # the client has the beginning: the rest from another, or an error event and an honest end
    END_ANSWER = "end_answer"  # it could not be continued
    FAIL = "fail"  # out of attempts: the row's status


class Evidence(enum.StrEnum):
    """What a failure says about the instance's health (`health.py`)."""

    # Nothing: the client's fault, the KV's, a restart's. In mid-stream it had answered; probes tell of one that died.
    NONE = "none"
    CONNECTION = "connection"  # it cannot be reached; a few in a row take it out
    REQUEST = "request"  # it failed at a request, which may be the request's fault: more in a row, of different ones


class Row(NamedTuple):
    action: Action
    status: int  # what the client gets when attempts run out and there is no answer of the instance to pass on
    evidence: Evidence


_P, _D = Leg.PREFILL, Leg.DECODE
_NONE, _CONNECTION, _REQUEST = Evidence.NONE, Evidence.CONNECTION, Evidence.REQUEST

TABLE: dict[tuple[Leg, Failure], Row] = {
    (_P, Failure.REFUSED): Row(Action.OTHER_PREFILLER, 503, _CONNECTION),
    (_P, Failure.CONNECT_TIMEOUT): Row(Action.OTHER_PREFILLER, 503, _CONNECTION),
    (_P, Failure.STALE): Row(Action.SAME_INSTANCE, 502, _NONE),
    (_P, Failure.RESET): Row(Action.OTHER_PREFILLER, 502, _REQUEST),
    (_P, Failure.TIMEOUT): Row(Action.OTHER_PREFILLER, 504, _REQUEST),
    (_P, Failure.INSTANCE_OUT): Row(Action.OTHER_PREFILLER, 503, _NONE),
    (_P, Failure.GARBAGE): Row(Action.OTHER_PREFILLER, 502, _REQUEST),
    (_P, Failure.CLIENT_ERROR): Row(Action.PASS_ON, 502, _NONE),
    (_P, Failure.SERVER_ERROR): Row(Action.OTHER_PREFILLER, 502, _REQUEST),
    (_P, Failure.ERROR_EVENT): Row(Action.OTHER_PREFILLER, 502, _NONE),
    (_P, Failure.LOST_MID_ANSWER): Row(Action.OTHER_PREFILLER, 502, _NONE),
    (_P, Failure.SILENT_MID_ANSWER): Row(Action.OTHER_PREFILLER, 504, _NONE),
    (_P, Failure.GARBAGE_MID_ANSWER): Row(Action.OTHER_PREFILLER, 502, _NONE),
    (_P, Failure.OUT_OF_TIME): Row(Action.FAIL, 504, _NONE),
    (_D, Failure.REFUSED): Row(Action.OTHER_DECODER, 503, _CONNECTION),
    (_D, Failure.CONNECT_TIMEOUT): Row(Action.OTHER_DECODER, 503, _CONNECTION),
    (_D, Failure.STALE): Row(Action.PREFILL_AGAIN, 502, _NONE),
    (_D, Failure.RESET): Row(Action.PREFILL_AGAIN, 502, _REQUEST),
    (_D, Failure.TIMEOUT): Row(Action.PREFILL_AGAIN, 504, _REQUEST),
    (_D, Failure.INSTANCE_OUT): Row(Action.PREFILL_AGAIN, 503, _NONE),
    (_D, Failure.GARBAGE): Row(Action.PREFILL_AGAIN, 502, _REQUEST),
    (_D, Failure.CLIENT_ERROR): Row(Action.PASS_ON, 502, _NONE),
    (_D, Failure.SERVER_ERROR): Row(Action.PREFILL_AGAIN, 502, _REQUEST),
    (_D, Failure.ERROR_EVENT): Row(Action.PREFILL_AGAIN, 502, _NONE),
    (_D, Failure.LOST_MID_ANSWER): Row(Action.CONTINUE, 502, _NONE),
    (_D, Failure.SILENT_MID_ANSWER): Row(Action.CONTINUE, 504, _NONE),
    (_D, Failure.GARBAGE_MID_ANSWER): Row(Action.CONTINUE, 502, _NONE),
    (_D, Failure.OUT_OF_TIME): Row(Action.END_ANSWER, 504, _NONE),
}


class Budget:
    """How often each leg may still be tried; `--max-retries` attempts a leg, at least one (as in the seeds' proxy)."""

    __slots__ = ("_delay_s", "_left", "num_retries")

    def __init__(self, max_attempts: int, retry_delay_s: float) -> None:
        self._left = {Leg.PREFILL: max(1, max_attempts), Leg.DECODE: max(1, max_attempts)}
        self._delay_s = retry_delay_s
        self.num_retries = 0

    def spend(self, leg: Leg) -> None:
        self._left[leg] -= 1

    def decide(self, leg: Leg, failure: Failure) -> tuple[Action, float]:
        """The action, and the seconds to wait before it: `retry_delay` doubled per retry, none on a stale
        connection."""
        action = TABLE[leg, failure].action
        if action in (Action.PASS_ON, Action.CONTINUE, Action.END_ANSWER, Action.FAIL):
            return action, 0.0
        needed = Leg.PREFILL if action is Action.PREFILL_AGAIN else leg
        if self._left[leg] <= 0 or self._left[needed] <= 0:
            return Action.FAIL, 0.0
        self.num_retries += 1
        delay = 0.0 if failure is Failure.STALE else self._delay_s * 2 ** (self.num_retries - 1)
        return action, delay

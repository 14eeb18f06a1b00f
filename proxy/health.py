"""Whether an instance is well, by what happened to requests and probes. Pure: time comes in.

| state | cannot be reached (probe or request) | fails at a request | is reached by a probe | answers a request |
|---|---|---|---|---|
| well | out after `max_failures` in a row | out after `max_request_failures` different ones in a row | well | well |
| out, not reachable | back-off doubles | back-off doubles | well | well |
| out, fails at requests | as above after `max_failures` in a row | back-off doubles | stays out: it fails | well |

An engine that dies with many requests in hand fails at all of them, and then can't be reached: what is reached again is
another process, of which nothing is known.

Out, an instance may be picked once `retry_at` has passed, and then by one request: the half-open trial. A request that
fails on every instance is its own fault, so its retries count once; a single success in between starts the count anew.

`healthy` is evidence; whether an operator wants the instance used (`enabled`) is another bit and lives elsewhere.
"""

from __future__ import annotations

FIRST_BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 30.0


class Health:
    """`doubted` tells whether anything counts against the instance: one look for the requests of a well one."""

    __slots__ = (
        "_back_off_s",
        "_fails_requests",
        "_last_request_id",
        "doubted",
        "healthy",
        "last_error",
        "max_failures",
        "max_request_failures",
        "num_failures",
        "num_request_failures",
        "retry_at",
    )

    def __init__(self, max_failures: int = 2, max_request_failures: int = 5) -> None:
        self.max_failures = max_failures
        self.max_request_failures = max_request_failures
        self.healthy = True
        self.doubted = False
        self.num_failures = 0
        self.num_request_failures = 0
        self.retry_at = 0.0
        self.last_error = ""
        self._back_off_s = FIRST_BACK_OFF_S
        self._fails_requests = False
        self._last_request_id = ""

    def may_try(self, now: float) -> bool:
        return self.healthy or now >= self.retry_at

    def begin_trial(self, now: float) -> None:
        """An instance that is out was picked: nobody else is let in until the back-off has passed once more."""
        if not self.healthy:
            self.retry_at = now + self._back_off_s

    def succeeded(self) -> bool:
        """A probe was answered. Returns whether the instance was out and is back."""
        self.num_failures = 0
        if self._fails_requests:
            return False
        was_out = not self.healthy
        self.healthy = True
        self.doubted = self.num_request_failures > 0
        self._back_off_s = FIRST_BACK_OFF_S
        return was_out

    def answered(self) -> bool:
        """A request was answered, below 500. Returns whether the instance was out and is back."""
        self.num_request_failures = 0
        self._fails_requests = False
        self._last_request_id = ""
        return self.succeeded()

    def failed(self, now: float, error: str) -> bool:
        """It could not be reached. Returns whether this took the instance out."""
        self.num_failures += 1
        is_too_often = self.num_failures >= self.max_failures
        if is_too_often:
            self._fails_requests = False
        return self._count(now, error, is_too_often)

    def request_failed(self, now: float, error: str, request_id: str) -> bool:
        """It was reached and failed at a request. Returns whether this took the instance out."""
        if request_id != self._last_request_id:
            self._last_request_id = request_id
            self.num_request_failures += 1
        is_too_often = self.num_request_failures >= self.max_request_failures
        if self.healthy and is_too_often:
            self._fails_requests = True
        return self._count(now, error, is_too_often)

    def _count(self, now: float, error: str, is_too_often: bool) -> bool:
        self.last_error = error
        self.doubted = True
        went_out = self.healthy and is_too_often
        if went_out:
            self.healthy = False
        elif not self.healthy:
            self._back_off_s = min(self._back_off_s * 2, MAX_BACK_OFF_S)
        if not self.healthy:
            self.retry_at = now + self._back_off_s
        return went_out

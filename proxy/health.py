"""Whether an instance is well, by what happened to requests and probes. Pure: time comes in.

| state | a connect failure | a success | may be picked |
|---|---|---|---|
| well | out after `max_failures` in a row | stays | yes |
| out | back-off doubles | well | once `retry_at` has passed, and then one request as the trial |

`healthy` is evidence; whether an operator wants the instance used (`enabled`) is another bit and lives elsewhere.
"""

from __future__ import annotations

FIRST_BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 30.0


class Health:
    __slots__ = ("_back_off_s", "healthy", "last_error", "max_failures", "num_failures", "retry_at")

    def __init__(self, max_failures: int = 2) -> None:
        self.max_failures = max_failures
        self.healthy = True
        self.num_failures = 0
        self.retry_at = 0.0
        self.last_error = ""
        self._back_off_s = FIRST_BACK_OFF_S

    def may_try(self, now: float) -> bool:
        return self.healthy or now >= self.retry_at

    def begin_trial(self, now: float) -> None:
        """An instance that is out was picked: nobody else is let in until the back-off has passed once more."""
        if not self.healthy:
            self.retry_at = now + self._back_off_s

    def succeeded(self) -> bool:
        """Returns whether the instance was out and is back."""
        was_out = not self.healthy
        self.healthy = True
        self.num_failures = 0
        self._back_off_s = FIRST_BACK_OFF_S
        return was_out

    def failed(self, now: float, error: str) -> bool:
        """Returns whether this failure took the instance out."""
        self.last_error = error
        self.num_failures += 1
        if self.healthy:
            if self.num_failures < self.max_failures:
                return False
            self.healthy = False
            self.retry_at = now + self._back_off_s
            return True
        self._back_off_s = min(self._back_off_s * 2, MAX_BACK_OFF_S)
        self.retry_at = now + self._back_off_s
        return False

"""When to try again what failed: after one second, then twice as long each time, a minute at most."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FIRST_S = 1.0
MOST_S = 60.0


class Backoff:
    """Thread-safe. Closed after a failure, open again when its time is over; a success forgets what was."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, first_s: float = FIRST_S) -> None:
        self._clock = clock
        self._first_s = first_s
        self._lock = threading.Lock()
        self._wait_s = 0.0
        self._closed_until = 0.0
        self._why = ""

    @property
    def why(self) -> str:
        """The last failure, while that keeps it closed; "" while it is open."""
        with self._lock:
            return self._why if self._clock() < self._closed_until else ""

    def failed(self, why: str) -> None:
        with self._lock:
            now = self._clock()
            if now < self._closed_until:
                return  # another thread met the same failure
            self._wait_s = min(MOST_S, self._wait_s * 2 or self._first_s)
            self._closed_until = now + self._wait_s
            self._why = why or "failed"

    def succeeded(self) -> None:
        with self._lock:
            self._wait_s = self._closed_until = 0.0
            self._why = ""

"""How fast a client sends its request, and whether it takes its answer. Pure."""

from __future__ import annotations

WINDOW_S = 10.0  # that a rate is measured over


class UploadRate:
    __slots__ = ("_num_bytes", "_since")

    def __init__(self, now: float) -> None:
        self._since = now
        self._num_bytes = 0

    def restart(self, now: float, num_bytes: int) -> None:
        self._since, self._num_bytes = now, num_bytes

    def is_below(self, bytes_per_s: float, now: float, num_bytes: int) -> bool:
        """Whether less came in the window that ends now; `num_bytes` is all that has come. False in a window."""
        elapsed = now - self._since
        if elapsed < WINDOW_S:
            return False
        slow = num_bytes - self._num_bytes < bytes_per_s * elapsed
        self.restart(now, num_bytes)
        return slow


class Stall:
    """Some of an answer waits for the client. It has stalled when it takes nothing of it for too long."""

    __slots__ = ("_num_bytes", "_since")

    def __init__(self, now: float, num_bytes: int) -> None:
        self._since = now
        self._num_bytes = num_bytes

    def is_longer(self, than_s: float, now: float, num_bytes: int) -> bool:
        """`num_bytes` is what waits now."""
        if num_bytes < self._num_bytes:
            self._since = now
        self._num_bytes = num_bytes
        return now - self._since > than_s

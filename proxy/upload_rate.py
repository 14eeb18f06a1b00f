"""How fast a client sends its request. Pure."""

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

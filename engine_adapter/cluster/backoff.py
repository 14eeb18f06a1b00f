"""How long to wait before a dead process is started again. Pure: time comes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Delays that double from `first_s` to `max_s`, and begin anew after `reset_after_s` in good health."""

    first_s: float = 0.3
    """Short: half of all deaths are single, and a decoder's absence is felt at once."""
    max_s: float = 30.0
    reset_after_s: float = 60.0
    num_deaths: int = 0
    """In a row, none of them after a long healthy time."""

    def died(self, now: float, healthy_since: float | None) -> float:
        """Seconds to wait. `healthy_since` is when its health last began, None if it never was."""
        if healthy_since is not None and now - healthy_since >= self.reset_after_s:
            self.num_deaths = 0
        self.num_deaths += 1
        return min(self.max_s, self.first_s * 2.0 ** min(self.num_deaths - 1, 32))

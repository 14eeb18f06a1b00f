"""What each instance is working on for us, and how fast it has shown to be.

Work is counted in tokens (see `scheduling/cost.py` for what a request counts). A `Reservation` gives itself back once,
whatever ends the request. Nothing here awaits, so picking and reserving cannot be torn apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Tokens per second assumed of an instance nobody has measured yet. Only ratios matter to a choice, so the same number
# for all is neutral; it is replaced by the first measurement.
UNKNOWN_SPEED = 5000.0
SPEED_WEIGHT = 0.2  # of a new measurement in the moving average: the last ~5 requests dominate
SPEED_SPREAD = 4.0  # an instance counts as at most this many times slower or faster than its fleet's mean


class InstanceLoad:
    """Open work of one instance. `num_tokens`, `num_requests`, `kv_tokens` are zero when nothing is open.

    `max_streams` and `max_kv_tokens` say how much it can hold (0: unknown); `on_release` is told of work that ended.
    """

    __slots__ = (
        "kv_tokens",
        "last_pick",
        "max_kv_tokens",
        "max_streams",
        "measured",
        "num_requests",
        "num_tokens",
        "on_release",
        "speed",
        "total_requests",
    )

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_requests = 0
        self.kv_tokens = 0
        self.max_streams = 0
        self.max_kv_tokens = 0
        self.on_release: Callable[[], None] | None = None
        self.total_requests = 0
        self.last_pick = 0
        self.speed = UNKNOWN_SPEED
        self.measured = False

    def has_room(self, kv_tokens: int) -> bool:
        """Whether a request that will hold `kv_tokens` fits beside what is open. An idle instance takes any: if it is
        too large for it, that is the engine's to say."""
        if not self.num_requests:
            return True
        if self.max_streams and self.num_requests >= self.max_streams:
            return False
        return not self.max_kv_tokens or self.kv_tokens + kv_tokens <= self.max_kv_tokens

    def reserve(self, num_tokens: int, kv_tokens: int = 0) -> Reservation:
        self.num_tokens += num_tokens
        self.kv_tokens += kv_tokens
        self.num_requests += 1
        self.total_requests += 1
        return Reservation(self, num_tokens, kv_tokens)

    def observe(self, num_tokens: float, seconds: float) -> None:
        """The instance got through `num_tokens` of work in `seconds`."""
        shown = num_tokens / max(seconds, 1e-6)
        self.speed = shown if not self.measured else self.speed + SPEED_WEIGHT * (shown - self.speed)
        self.measured = True

    def __repr__(self) -> str:
        return f"<InstanceLoad {self.num_requests} requests, {self.num_tokens} tokens, {self.speed:.0f} tokens/s>"


class Reservation:
    """Work reserved on one instance; `release()` gives it back exactly once. `ahead` is what was open before it."""

    __slots__ = ("_kv_tokens", "_load", "ahead", "num_tokens")

    def __init__(self, load: InstanceLoad, num_tokens: int, kv_tokens: int = 0) -> None:
        self._load: InstanceLoad | None = load
        self._kv_tokens = kv_tokens
        self.num_tokens = num_tokens
        self.ahead = load.num_tokens - num_tokens

    def release(self) -> None:
        load = self._load
        if load is not None:
            self._load = None
            load.num_tokens -= self.num_tokens
            load.kv_tokens -= self._kv_tokens
            load.num_requests -= 1
            if load.on_release is not None:
                load.on_release()


def settle_speeds(loads: Iterable[InstanceLoad], drift: float) -> None:
    """Keep the speeds of one fleet comparable.

    Every speed moves by the fraction `drift` towards the mean, so that an instance that was slow once (a cold start) is
    tried again; unmeasured ones take the mean; none stays beyond SPEED_SPREAD of it. Called once a maintenance tick.
    """
    fleet = list(loads)
    known = [load.speed for load in fleet if load.measured]
    if not known:
        return
    mean = sum(known) / len(known)
    for load in fleet:
        speed = load.speed + drift * (mean - load.speed) if load.measured else mean
        load.speed = min(max(speed, mean / SPEED_SPREAD), mean * SPEED_SPREAD)

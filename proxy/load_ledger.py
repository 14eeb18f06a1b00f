"""What each instance is working on for us, and how fast it has shown to be.

Work is counted in tokens (see `scheduling/cost.py` for what a request counts). A `Reservation` gives itself back once,
whatever ends the request. Nothing here awaits, so picking and reserving cannot be torn apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Tokens per second assumed of an instance nobody has measured yet. Only ratios matter to a choice, so the same number
# for all is neutral; it is replaced by the first measurement.
UNKNOWN_SPEED = 5000.0
SPEED_MEMORY = 0.95  # of what was measured is left after the next measurement: the last ~20 dominate
SPEED_SPREAD = 4.0  # an instance counts as at most this many times slower or faster than its fleet's mean
# So much slower or faster than the mean, equal engines look for no lasting reason (a neighbour, a cold start, whose
# streams were measured); `even_speed` leaves it out. One of four that is 1.4 times as slow as the others is beyond it.
# In bench/policy_simulator.py up to 1.25 costs nothing, 1.35 costs 2 ms of p99 TPOT.
SPEED_NOISE = 1.25


class InstanceLoad:
    """Open work of one instance. `num_tokens`, `num_requests`, `kv_tokens` are zero when nothing is open.

    `max_streams` and `max_kv_tokens` say how much it can hold (0: unknown); `on_release` is told of work that ended,
    `on_measured` of the first measurement. `speed` is in tokens per second; `even_speed` is that of the fleet where
    `speed` differs from it by no more than SPEED_NOISE. What is open is counted for this process. `others_*` is what
    other worker processes have open there, as last read from the load board: always zero with one.
    """

    __slots__ = (
        "_last_end",
        "_seconds",
        "_tokens",
        "even_speed",
        "fleet_speed",
        "kv_tokens",
        "last_pick",
        "max_kv_tokens",
        "max_streams",
        "measured",
        "num_requests",
        "num_tokens",
        "on_measured",
        "on_release",
        "others_kv_tokens",
        "others_policy_load",
        "others_requests",
        "others_tokens",
        "policy_load",
        "speed",
        "total_requests",
    )

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_requests = 0
        self.kv_tokens = 0
        self.others_tokens = 0
        self.others_requests = 0
        self.others_kv_tokens = 0
        self.others_policy_load = 0
        self.max_streams = 0
        self.max_kv_tokens = 0
        self.on_release: Callable[[], None] | None = None
        self.on_measured: Callable[[], None] | None = None
        self.total_requests = 0
        self.last_pick = 0
        self.policy_load = 0  # what a policy holds in a measure of its own
        self.speed = self.even_speed = UNKNOWN_SPEED
        self.fleet_speed = 0.0  # the mean, as of the latest `settle_speeds`
        self.measured = False
        self._tokens = 0.0
        self._seconds = 0.0
        self._last_end = 0.0

    def has_room(self, kv_tokens: int) -> bool:
        """Whether a request that will hold `kv_tokens` fits beside what is open. An idle instance takes any: if it is
        too large for it, that is the engine's to say."""
        if not self.num_requests:
            return True
        if self.max_streams and self.num_requests >= self.max_streams:
            return False
        return not self.max_kv_tokens or self.kv_tokens + kv_tokens <= self.max_kv_tokens

    @property
    def all_requests(self) -> int:
        return self.num_requests + self.others_requests

    def changed(self) -> None:
        """Told after what a policy holds has changed."""

    def is_used_elsewhere(self) -> bool:
        return False

    def leave(self) -> None:
        """Its instance is none of ours any more."""

    def reserve(self, num_tokens: int, kv_tokens: int = 0) -> Reservation:
        self.num_tokens += num_tokens
        self.kv_tokens += kv_tokens
        self.num_requests += 1
        self.total_requests += 1
        return Reservation(self, num_tokens, kv_tokens)

    def observe(self, num_tokens: float, seconds: float) -> None:
        """The instance got through `num_tokens` of work in `seconds`.

        Speed is a quotient of sums and no mean of quotients: a short piece of work, of which little can be said, has
        little weight.
        """
        self._tokens = self._tokens * SPEED_MEMORY + num_tokens
        self._seconds = self._seconds * SPEED_MEMORY + seconds
        self._show(self._tokens / max(self._seconds, 1e-6))
        if not self.measured:
            self.measured = True
            if self.on_measured is not None:
                self.on_measured()

    def observe_queue(self, num_tokens: float, began: float, now: float) -> None:
        """As `observe`, for work that is done one after the other: it began at `began`, or when the work before it
        had ended."""
        self.observe(num_tokens, now - max(began, self._last_end))
        self._last_end = now

    def forget(self) -> None:
        """What was measured was another process's, or one in trouble: it counts as unmeasured again."""
        self.measured = False
        self._tokens = self._seconds = 0.0

    def set_speed(self, speed: float) -> None:
        """Go on as if it had shown `speed`."""
        self._show(speed)
        self._seconds = self._tokens / speed

    def _show(self, speed: float) -> None:
        self.speed = speed
        mean = self.fleet_speed or speed
        if speed > mean * SPEED_NOISE:
            self.even_speed = speed / SPEED_NOISE
        elif speed * SPEED_NOISE < mean:
            self.even_speed = speed * SPEED_NOISE
        else:
            self.even_speed = mean

    def __repr__(self) -> str:
        return f"<InstanceLoad {self.num_requests} requests, {self.num_tokens} tokens, {self.speed:.0f} tokens/s>"


class Reservation:
    """Work reserved on one instance; `release()` gives it back exactly once. `ahead` is what was open before it."""

    __slots__ = ("_kv_tokens", "_load", "ahead", "num_tokens")

    def __init__(self, load: InstanceLoad, num_tokens: int, kv_tokens: int = 0) -> None:
        self._load: InstanceLoad | None = load
        self._kv_tokens = kv_tokens
        self.num_tokens = num_tokens
        self.ahead = load.num_tokens + load.others_tokens - num_tokens

    def release(self) -> None:
        load = self._load
        if load is not None:
            self._load = None
            load.num_tokens -= self.num_tokens
            load.kv_tokens -= self._kv_tokens
            load.num_requests -= 1
            if load.on_release is not None:
                load.on_release()


class Hold:
    """What a policy holds on one instance in a measure of its own; `release()` gives it back exactly once."""

    __slots__ = ("_amount", "_load")

    def __init__(self, load: InstanceLoad, amount: int) -> None:
        self._load: InstanceLoad | None = load
        self._amount = amount
        load.policy_load += amount
        load.changed()

    def release(self) -> None:
        load = self._load
        if load is not None:
            self._load = None
            load.policy_load -= self._amount
            load.changed()


def settle_speeds(loads: Iterable[InstanceLoad], drift: float) -> None:
    """Keep the speeds of one fleet comparable.

    The speed of one that has nothing to do moves by the fraction `drift` towards the mean, so that an instance that was
    slow once (a cold start) is tried again; unmeasured ones take the mean; none stays beyond SPEED_SPREAD of it. Called
    once a maintenance tick, and when one is measured for the first time: beside that, UNKNOWN_SPEED is no guess.
    """
    fleet = list(loads)
    known = [load.speed for load in fleet if load.measured]
    if not known:
        return
    mean = sum(known) / len(known)
    for load in fleet:
        load.fleet_speed = mean
        if not load.measured:
            load.speed = load.even_speed = mean
            continue
        drifted = load.speed if load.num_requests else load.speed + drift * (mean - load.speed)
        load.set_speed(min(max(drifted, mean / SPEED_SPREAD), mean * SPEED_SPREAD))

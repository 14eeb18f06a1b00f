"""Candidates and requests as policies see them, and the proxy's part around a pick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from proxy.health import Health
from proxy.load_ledger import Hold, InstanceLoad, Reservation
from proxy.scheduling import Policy, Prefix


@dataclass(eq=False)
class Stub:
    key: str = ""
    enabled: bool = True
    health: Health = field(default_factory=lambda: Health(1))
    load: InstanceLoad = field(default_factory=InstanceLoad)


def fleet(num: int) -> list[Stub]:
    return [Stub(f"10.0.0.{number}:8000") for number in range(num)]


NO_PREFIX = Prefix((), 256.0)


@dataclass(frozen=True)
class StubAsk:
    body_bytes: int = 4000
    session_key: bytes = b""
    prefix: Prefix = NO_PREFIX


class NothingMayBeAsked:
    """For a policy that pays for nothing it does not need."""

    @property
    def body_bytes(self) -> NoReturn:
        raise AssertionError("asked for the size of the body")

    @property
    def session_key(self) -> NoReturn:
        raise AssertionError("asked for the session")

    @property
    def prefix(self) -> NoReturn:
        raise AssertionError("asked for the prefix")


class Chooser:
    """What `proxy/legs.py` does around a pick."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.num_picks = 0
        self.open: list[list[Reservation | Hold]] = []

    def choose(self, candidates: Sequence[Stub], num_tokens: int, ask: StubAsk) -> Stub:
        one = self.policy.pick(candidates, num_tokens, ask)
        assert one in candidates
        self.num_picks += 1
        one.load.last_pick = self.num_picks
        held: list[Reservation | Hold] = [one.load.reserve(num_tokens)]
        if self.policy.holds:
            held.append(self.policy.hold(one.load, ask))
        self.open.append(held)
        return one

    def end(self, number: int = 0) -> None:
        """The request that is open as the `number`-th ends; twice, as it may when a failure and its end coincide."""
        for held in self.open.pop(number) * 2:
            held.release()

"""What a policy is: who picks, what it is asked, and what it may hold. The policies are the other files here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from proxy.load_ledger import Hold, InstanceLoad
from proxy.scheduling.candidate import CandidateT
from proxy.scheduling.cost import expected_wait

Reason = tuple[str, float, float | None]
"""Why an instance was picked: what decided, and the expected wait [s] on it and on the best of all others, None where
there was no other. The waits are those of `least_load` whatever the policy, so that all can be compared."""


class Prefix(NamedTuple):
    """The beginnings of a prompt: `keys[i]` names its first `i + 1` chunks, of `chunk_tokens` each."""

    keys: tuple[int, ...]
    chunk_tokens: float


class Ask(Protocol):
    """What a policy may want to know of a request beside its cost. Each is computed only if it is looked at."""

    @property
    def body_bytes(self) -> int: ...

    @property
    def session_key(self) -> bytes:
        """Empty if the request names no session."""
        ...

    @property
    def prefix(self) -> Prefix: ...


class Policy:
    """One object for each role, so that what a policy remembers of prefillers is not mixed up with decoders.

    The caller filters the candidates, calls `pick`, notes the pick in `load.last_pick`, and reserves, all without an
    await in between. `hold` is called then too, if `holds`: the instance's `load.policy_load` in a measure of the
    policy's own, given back at the decoder's first event (prefill) or when the request leaves the decoder (decode).
    """

    name: ClassVar[str]
    holds: ClassVar[bool] = False

    def __init__(self, role: str, seed: int | None = None) -> None:
        """`role` is "prefill" or "decode"; `seed` makes a policy that draws lots repeatable."""
        self.role = role
        self.decided_by = self.name
        """What decided the latest pick, where a policy has more than one thing to go by."""

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        """One of `candidates` (at least one is given) for a request that costs `num_tokens`."""
        raise NotImplementedError

    def waits(self, candidates: Sequence[CandidateT], num_tokens: int) -> list[float]:
        """The expected wait on each, in a list to be used up. A policy that computed them to pick returns those."""
        return [expected_wait(self.role, one.load, num_tokens + one.load.others_tokens) for one in candidates]

    def reason(self, candidates: Sequence[CandidateT], picked: CandidateT, num_tokens: int) -> Reason:
        """Of the pick that was made a moment ago, with nothing reserved since."""
        if len(candidates) == 1:
            return "only_one", expected_wait(self.role, picked.load, num_tokens), None
        waits = self.waits(candidates, num_tokens)
        at = candidates.index(picked)
        wait_s, waits[at] = waits[at], math.inf
        return self.decided_by, wait_s, min(waits)

    def hold(self, load: InstanceLoad, ask: Ask) -> Hold:
        raise NotImplementedError

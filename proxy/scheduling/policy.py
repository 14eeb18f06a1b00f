"""What a policy is: who picks, what it is asked, and what it may hold. The policies are the other files here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from proxy.load_ledger import Hold, InstanceLoad
from proxy.scheduling.candidate import CandidateT


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

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        """One of `candidates` (at least one is given) for a request that costs `num_tokens`."""
        raise NotImplementedError

    def hold(self, load: InstanceLoad, ask: Ask) -> Hold:
        raise NotImplementedError

"""Choosing an instance: cost, filter, score, pick. One policy a file; to add one, a file and a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from proxy.scheduling.candidate import CandidateT
from proxy.scheduling.least_load import LeastLoad


class Policy(Protocol):
    name: str

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int) -> CandidateT:
        """One of `candidates` (at least one is given) for a request that costs `num_tokens`. Must not await."""
        ...


POLICIES: dict[str, type[Policy]] = {"least_load": LeastLoad}

"""Policy `session`: one session, one instance, as long as it is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from proxy.scheduling.candidate import CandidateT
from proxy.scheduling.least_load import LeastLoad
from proxy.scheduling.policy import Ask, Policy

SESSION_HEADER = b"x-session-id:"
MAX_KNOWN_INSTANCES = 4096  # digests kept; beyond it all are made anew
_MASK = (1 << 64) - 1


class Session(Policy):
    """score [no unit] = mix(digest of the session key ^ digest of the instance's key); the highest wins.

    Rendezvous hashing (Thaler and Ravishankar, 1998): every proxy and every restart comes to the same choice, nothing
    is remembered of a session, and when an instance is out only its own sessions move, each to its second choice.
    Load does not enter. A request that names no session goes where `least_load` sends it.
    """

    name = "session"

    def __init__(self, role: str, seed: int | None = None) -> None:
        super().__init__(role, seed)
        self._fallback = LeastLoad(role, seed)
        self._digests: dict[str, int] = {}

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        key = ask.session_key
        self.decided_by = self.name if key else self._fallback.name
        if not key:
            return self._fallback.pick(candidates, num_tokens, ask)
        session = _digest(key)
        return max(candidates, key=lambda one: _mix(session ^ self._instance(one.key)))

    def _instance(self, key: str) -> int:
        digest = self._digests.get(key)
        if digest is None:
            if len(self._digests) >= MAX_KNOWN_INSTANCES:
                self._digests.clear()
            digest = self._digests[key] = _digest(key.encode())
        return digest


def session_key_of(header_lines: Sequence[bytes], fields: Mapping[str, Any]) -> bytes:
    """The value of `X-Session-ID`, else the body's `user`, else nothing."""
    for line in header_lines:
        if line[: len(SESSION_HEADER)].lower() == SESSION_HEADER:
            return line[len(SESSION_HEADER) :].strip()
    user = fields.get("user")
    return user.encode("utf-8", "surrogatepass") if isinstance(user, str) else b""


def _digest(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the result depends on every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

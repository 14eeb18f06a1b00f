"""Faults that a mock engine can be told to show, for its next requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What is done instead of reading the request, so the KV it names stays unread.
BEFORE = frozenset({"status", "hang_before_head", "reset_before_head", "close_before_head", "garbage"})
# What is done in the course of an answer; the KV was read.
WITHIN = frozenset(
    {
        "error_event",
        "error_event_mid",
        "reset_mid",
        "close_mid",
        "hang_mid",
        "garbage_mid",
        "bad_json",
        "push_failed",
        "no_kv",
        "recomputed",
        "cut_at",
    }
)
KINDS = BEFORE | WITHIN


@dataclass(slots=True)
class Fault:
    """`count` requests are hit, of all instances together if they share it. A fault in mid-stream comes `after` so many
    tokens. `recomputed`: after so many tokens the decoder gives up its KV, as vllm-ascend has it. `cut_at`: of the body
    of a stream, framing included, so many bytes come before the connection is closed."""

    kind: str
    count: int = 1
    status: int = 500
    after: int = 3
    consume: bool | None = None
    message: str = "injected fault"

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Fault:
        """Raises ValueError, which says what is wrong."""
        known = {key: value for key, value in fields.items() if key not in ("port", "role")}
        if known.get("kind") not in KINDS:
            raise ValueError(f"kind must be one of {sorted(KINDS)}")
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(str(error)) from None

    @property
    def consumes(self) -> bool:
        return self.kind in WITHIN if self.consume is None else self.consume

    def take(self) -> bool:
        """Whether this request is hit; counts it."""
        self.count -= 1
        return self.count >= 0

"""The engine's side of a KV hand-off: what the core calls, on its own thread, and what it is told in return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


class KvTransferUnavailable(Exception):
    """No sidecar, or it refused the offer: the KV can't be handed out. The request is answered without parameters."""


@dataclass(frozen=True, slots=True)
class PullResult:
    """How the one pull of a request ended. Nothing writes into its blocks any more."""

    request_id: str
    ok: bool
    reason: str = ""
    """Empty where `ok`; else a word of the sidecar's, such as expired or unreachable."""
    message: str = ""
    num_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    transport: str = ""
    peer: str = ""


@dataclass(frozen=True, slots=True)
class KvEvents:
    """What happened since the last poll."""

    pulls: list[PullResult] = field(default_factory=list)
    ended_offers: list[str] = field(default_factory=list)
    """Request ids whose offered blocks nobody may read any more."""


class KvTransfer(Protocol):
    """Moves blocks between pools. Called on the engine thread only; no call waits for a peer."""

    def check(self, params: dict[str, Any]) -> None:
        """Raises EngineRequestError (400) where parameters with do_remote_prefill are incomplete."""

    def start_pull(self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int) -> None:
        """Fill `local_block_ids` with the lease's blocks from `first_block` on. One PullResult follows, always."""

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        """Hold these blocks out to a decoder; the kv_transfer_params to answer with. Raises KvTransferUnavailable."""

    def drop(self, params: dict[str, Any]) -> None:
        """Tell the producer that nobody will read this KV. Idempotent, fire and forget."""

    def revoke(self, request_id: str) -> None:
        """Take an offer back. The request's id still comes in `ended_offers`."""

    def abandon(self, request_id: str) -> None:
        """Nobody wants this pull any more. Its PullResult still follows."""

    def poll(self) -> KvEvents:
        """Everything that ended since the last call, without waiting."""

    def close(self) -> None:
        """Let go of the sidecar."""

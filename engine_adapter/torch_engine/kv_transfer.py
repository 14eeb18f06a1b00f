"""The engine's side of a KV hand-off: what the core calls, on its own thread, and what it is told in return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from sidecar.protocol import Ready


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
    ended_pushes: list[tuple[str, str]] = field(default_factory=list)
    """(request id, outcome): likewise of pushed blocks; consumed, dropped, expired, revoked or sidecar_lost."""


class KvTransfer(Protocol):
    """Moves blocks between pools. Called on the engine thread only; no call waits for a peer."""

    def check(self, params: dict[str, Any]) -> None:
        """Raises EngineRequestError (400) where parameters with do_remote_prefill are incomplete."""

    def start_pull(self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int) -> None:
        """Fill `local_block_ids` with the lease's blocks from `first_block` on. One PullResult follows, always."""

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        """Hold these blocks out to a decoder; the kv_transfer_params to answer with. Raises KvTransferUnavailable."""

    def land(
        self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int, num_tokens: int
    ) -> None:
        """Hold `local_block_ids` out to a prefiller, and have one asked for. One PullResult follows, always."""

    def push(
        self, request_id: str, params: dict[str, Any], block_ids: list[int], num_tokens: int, ready: Ready
    ) -> None:
        """Lease blocks that are still computed to a decoder's landing; the end comes in `ended_pushes`.

        Raises KvTransferUnavailable.
        """

    def mark_ready(self, request_id: str, ready: Ready) -> None:
        """More of a push lies in the pool. Called within a forward: it sends, and does not wait."""

    def drop(self, params: dict[str, Any]) -> None:
        """Tell the producer that nobody will read this KV. Idempotent, fire and forget."""

    def revoke(self, request_id: str) -> None:
        """Take an offer or a push back. Its end is still reported."""

    def abandon(self, request_id: str) -> None:
        """Nobody wants this pull any more. Its PullResult still follows."""

    def poll(self) -> KvEvents:
        """Everything that ended since the last call, without waiting."""

    def close(self) -> None:
        """Let go of the sidecar."""

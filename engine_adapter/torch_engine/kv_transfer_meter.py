"""A KvTransfer that tells somebody of every pull that ended, and is otherwise the one it stands before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransfer, PullResult


class MeteredKvTransfer:
    """Adds `observe_pull` to a KvTransfer; called on the engine thread, like the rest."""

    def __init__(self, transfer: KvTransfer, observe_pull: Callable[[PullResult], None]) -> None:
        self._transfer = transfer
        self._observe_pull = observe_pull
        self.check = transfer.check
        self.start_pull = transfer.start_pull
        self.land = transfer.land
        self.push = transfer.push
        self.mark_ready = transfer.mark_ready
        self.drop = transfer.drop
        self.revoke = transfer.revoke
        self.abandon = transfer.abandon
        self.close = transfer.close

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        return self._transfer.offer(request_id, block_ids, num_tokens, num_cached_tokens)

    def poll(self) -> KvEvents:
        events = self._transfer.poll()
        for pull in events.pulls:
            self._observe_pull(pull)
        return events

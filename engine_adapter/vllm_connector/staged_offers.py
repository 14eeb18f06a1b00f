"""The scheduler's part in staging: which prompts' blocks the workers copy into the buffer, in which step, and where.

A request's parameters travel with its answer, so its blocks must lie in the buffer before it is over: they are copied
in the step that computes the last of its prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from engine_adapter.kv_transfer_params import wants_remote_decode
from engine_adapter.memory.slots import Slots
from engine_adapter.vllm_connector.block_tables import BlockTables
from engine_adapter.vllm_connector.metadata import StageOrder

logger = logging.getLogger(__name__)


def split_slots(num_slots: int, kv_role: str) -> tuple[Slots, Slots]:
    """Slots for offers, which the scheduler deals out, and for pulls, which each worker does: by role, or halves."""
    num_offers = {"kv_producer": num_slots, "kv_consumer": 0}.get(kv_role, num_slots // 2)
    return Slots(num_offers), Slots(num_slots - num_offers, first=num_offers)


class StagedOffers:
    """Called on the scheduler's thread only. Where nothing is staged it does nothing."""

    def __init__(self, kv_role: str, block_size: int) -> None:
        self._kv_role = kv_role
        self._block_size = block_size
        self._slots: Slots | None = None
        self._requests: dict[str, Any] = {}
        self._tables = BlockTables()
        self._staged: dict[str, list[int]] = {}

    @property
    def on(self) -> bool:
        """Whether the sidecars' pools are staging buffers."""
        return self._slots is not None

    def buffer_is(self, num_slots: int) -> None:
        """What the sidecars say of the pool: 0 where it is the KV itself."""
        if num_slots and self._slots is None:
            self._slots, _ = split_slots(num_slots, self._kv_role)

    def follow(self, request: Any) -> None:
        """A new request: its blocks are staged if it is prefilled for somebody else."""
        if wants_remote_decode(request.kv_transfer_params):
            self._requests[request.request_id] = request

    def step(self, scheduler_output: Any) -> list[StageOrder]:
        """What the workers are to copy after this step's forward."""
        if not self._requests or scheduler_output is None:
            return []
        computed = self._tables.follow(scheduler_output, self._requests)
        orders = []
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None or self._slots is None:
                continue
            if computed[request_id] + num_tokens >= request.num_prompt_tokens:
                order = self._stage(request_id, -(-request.num_prompt_tokens // self._block_size))
                orders += [order] if order else []
        return orders

    def take(self, request_id: str, num_blocks: int) -> list[int] | None:
        """The slots of a request's first blocks, which it now offers; None where they are not staged."""
        slots = self._staged.get(request_id)
        return slots[:num_blocks] if slots and num_blocks <= len(slots) else None

    def forget(self, request_id: str) -> None:
        """It has ended; slots that were offered stay until `free`."""
        self._requests.pop(request_id, None)
        self._tables.forget(request_id)

    def free(self, request_ids: Iterable[str]) -> None:
        """Nobody reads these requests' slots any more."""
        for request_id in request_ids:
            slots = self._staged.pop(request_id, None)
            if slots is not None and self._slots is not None:
                self._slots.give_back(slots)

    def _stage(self, request_id: str, num_blocks: int) -> StageOrder | None:
        blocks = self._tables.blocks.get(request_id, [])[:num_blocks]
        slots = self._staged.get(request_id)
        if slots is None:
            assert self._slots is not None
            slots = self._slots.take(num_blocks)
            if slots is None:
                logger.warning(
                    "not_staged request_id=%s blocks=%d slots_free=%d remedy=staging_bytes",
                    request_id, num_blocks, self._slots.num_free,
                )  # fmt: skip
                del self._requests[request_id]
                return None
            self._staged[request_id] = slots
        del self._requests[request_id]  # once is enough: the prompt's KV does not change
        return StageOrder(tuple(blocks), tuple(slots))

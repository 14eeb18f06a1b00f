"""Block tables of some requests, followed from step to step as vLLM tells its workers. Pure."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


class BlockTables:
    """`blocks` has each followed request's block ids so far, in the order of its tokens."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[int]] = {}

    def follow(self, output: Any, wanted: Container[str]) -> dict[str, int]:
        """Take in one step; the tokens computed before it, of each wanted request that is scheduled in it."""
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            if new.req_id in wanted:
                self.blocks[new.req_id] = list(new.block_ids[0])
                computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        resumed = _resumed(cached)
        for request_id, blocks, num_tokens in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in wanted:
                fresh = list(blocks[0]) if blocks else []
                before = [] if request_id in resumed else self.blocks.get(request_id, [])
                self.blocks[request_id] = before + fresh
                computed[request_id] = num_tokens
        return computed

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self.blocks.pop(request_id, None)


def _resumed(cached: Any) -> set[str]:
    """Requests whose whole block table is told anew. vLLM 0.11 has a list of flags, later versions the ids."""
    ids = getattr(cached, "resumed_req_ids", None)
    if ids is not None:
        return set(ids)
    flags = getattr(cached, "resumed_from_preemption", ())
    return {request_id for request_id, flag in zip(cached.req_ids, flags, strict=False) if flag}

"""Layerwise push as vLLM's scheduler sees it: which prompts a decoder has pushed to it, which a prefiller pushes.

A decoder's blocks are landed by its worker, which calls the metaserver. A prefiller's lease begins with the first step
of a prompt, and gets blocks as vLLM gives them: to one chunk of the prompt after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine_adapter.kv_transfer_params import InvalidKvTransferParams
from engine_adapter.push_params import (
    PushLanding,
    calls_metaserver,
    check_metaserver,
    for_request,
    parse_push_landing,
    push_failed,
    wants_push,
)
from engine_adapter.sidecar_link import push_target
from engine_adapter.vllm_connector.block_tables import BlockTables
from engine_adapter.vllm_connector.compat import external_id, finished_well
from engine_adapter.vllm_connector.metadata import LandOrder, MarkOrder, OfferNote
from engine_adapter.vllm_connector.scheduler_link import SchedulerLink
from sidecar.errors import SidecarError
from sidecar.protocol import Ready

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Push:
    """One request whose KV is pushed. `num_done_blocks`: computed in steps before this one, and still held."""

    request: Any
    landing: PushLanding
    num_done_blocks: int = 0
    open: str = ""
    """The transfer id of the lease on the blocks it has now."""
    leased: list[int] = field(default_factory=list)
    """Blocks that were given to that lease."""
    at_the_end: bool = False
    """Nothing more is marked before the request has ended well."""
    leases: list[tuple[str, str]] = field(default_factory=list)
    """(transfer id, epoch) of all leases, each of which ends once."""


class SchedulerPush:
    """Called on the scheduler's thread only. `fault` says why this engine takes no part, "" if it does."""

    def __init__(self, links: Sequence[SchedulerLink], kv_role: str, block_size: int, lease_s: float, fault: str):
        self._link = links[0]
        self._fault = fault
        self._produces = kv_role != "kv_consumer"
        self._consumes = kv_role != "kv_producer"
        self._block_size = block_size
        self._lease_s = lease_s
        self._settled: set[str] = set()
        """Decoders' requests that have their blocks, or are computed here."""
        self._pushes: dict[str, _Push] = {}
        self._tables = BlockTables()
        self._refused: dict[str, str] = {}
        """By request, why it is not pushed."""
        self._late: list[MarkOrder] = []

    # The decoder's part.

    def num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens a prefiller is to compute; the KV of the last one is computed here, and not asked for."""
        if request.request_id in self._settled or self._why_not(request):
            return 0, False
        if request.num_tokens - 1 <= num_computed_tokens:
            return 0, False
        return request.num_tokens - num_computed_tokens, True

    def allocated(self, request: Any, block_ids: Sequence[int], num_external_tokens: int) -> LandOrder | None:
        """The request got its blocks, or needs none; those who wait for another prompt of its list are told so too."""
        request_id, params = request.request_id, request.kv_transfer_params
        if request_id in self._settled:
            return None
        self._settled.add(request_id)
        if why := self._why_not(request):
            logger.warning("recomputing request_id=%s prompt_tokens=%d reason=%s", request_id, request.num_tokens, why)
        name, first = external_id(request), 0
        local: tuple[int, ...] = ()
        if num_external_tokens > 0:
            first = (request.num_tokens - num_external_tokens) // self._block_size
            local = tuple(block_ids[first : self._num_blocks(request.num_tokens)])
        elif not _is_of_a_list(params, name) or self._invalid(params):
            return None
        return LandOrder(request_id, name, params["metaserver"], local, first, request.num_tokens)

    # The prefiller's part.

    def follow(self, request: Any) -> None:
        """A new request: it is pushed if a decoder has landed blocks for it."""
        known = request.request_id in self._pushes or request.request_id in self._refused
        if known or not wants_push(request.kv_transfer_params):
            return
        try:
            landing = parse_push_landing(for_request(request.kv_transfer_params, external_id(request)))
        except InvalidKvTransferParams as error:
            self._refuse(request, str(error))
            return
        if not landing.landing_id:
            return  # the decoder has it all
        num_blocks = self._num_blocks(request.num_prompt_tokens)
        if (landing.num_tokens, landing.num_blocks) != (request.num_prompt_tokens, num_blocks):
            self._refuse(
                request,
                f"the decoder's prompt has {landing.num_tokens} tokens in {landing.num_blocks} blocks, here it has "
                f"{request.num_prompt_tokens} in {num_blocks}: both need the same model and --block-size",
            )
        elif self._fault or not self._produces:
            self._refuse(request, self._fault or "kv_role is kv_consumer")
        else:
            self._pushes[request.request_id] = _Push(request, landing)

    def step(self, output: Any) -> list[MarkOrder]:
        """What the worker is to mark in this step's forward; leases whose blocks vLLM has taken away end first."""
        orders, self._late = self._late, []
        for push in self._pushes.values():
            if push.request.status.name == "PREEMPTED":
                self._take_back(push)
        if not self._pushes or output is None:
            return orders
        computed = self._tables.follow(output, self._pushes)
        loads_now = bool(getattr(output, "has_sync_kv_loads", False))
        for request_id, before in computed.items():
            push, num_tokens = self._pushes[request_id], output.num_scheduled_tokens[request_id]
            if request_id in self._refused or push.num_done_blocks == push.landing.num_blocks:
                continue
            self._let_go_if_void(push, self._tables.blocks[request_id])
            if not push.open and not self._begin(push):
                continue
            push.at_the_end |= loads_now or (before > 0 and _is_loaded_by_others(push.request, output))
            if push.at_the_end:
                continue
            first, end = push.num_done_blocks, before + num_tokens
            is_last = end >= push.landing.num_tokens
            end_block = push.landing.num_blocks if is_last else end // self._block_size
            if end_block > first:
                more = self._tables.blocks[request_id][len(push.leased) : end_block]
                orders.append(MarkOrder(push.open, first, end_block, tuple(more)))
                push.num_done_blocks = end_block
                push.leased += more
        return orders

    def finished(self, request: Any, block_ids: Sequence[int] = ()) -> tuple[list[OfferNote], dict[str, Any] | None]:
        """The request is over: the leases that hold its blocks until they have ended, and what its answer says."""
        request_id = request.request_id
        self._settled.discard(request_id)
        self._tables.forget(request_id)
        push, well = self._pushes.pop(request_id, None), finished_well(request)
        leases = push.leases if push is not None else []
        if push is not None and push.open and not well:
            self._link.revoke(push.open)
        elif push is not None and well and request_id not in self._refused:
            if not push.open:
                self._refuse(request, "it was preempted before it ended")
            elif self._link.epoch != leases[-1][1]:
                self._refuse(request, "the sidecar was lost")
            elif push.at_the_end:
                self._mark_all(push, list(block_ids))
        why = self._refused.pop(request_id, "")
        return [OfferNote(request_id, (lease,)) for lease in leases], push_failed(why) if why and well else None

    def _mark_all(self, push: _Push, block_ids: list[int]) -> None:
        """All of a push that was not marked by layers."""
        num_blocks, num_leased = push.landing.num_blocks, len(push.leased)
        if push.leased != block_ids[:num_leased]:
            self._link.revoke(push.open)
            self._refuse(push.request, "its blocks were taken away")
            return
        more = tuple(block_ids[num_leased:num_blocks])
        self._late.append(MarkOrder(push.open, num_blocks, num_blocks, more))

    def _begin(self, push: _Push) -> bool:
        """Lease blocks that are still to come to the landing. Nothing counts as computed yet, a prefix that was found
        in the cache neither: vLLM finds blocks as soon as another request of the same step is to compute them."""
        request_id, landing = push.request.request_id, push.landing
        self._link.poll()
        client = self._link.client
        try:
            if client is None:
                raise SidecarError("the sidecar is away")
            target, num_blocks = push_target(landing), landing.num_blocks
            offer = client.push(request_id, (), landing.num_tokens, self._lease_s, target, Ready(), num_blocks)
        except SidecarError as error:
            self._refuse(push.request, str(error))
            return False
        push.open = offer.transfer_id
        push.leases.append((offer.transfer_id, offer.epoch))
        return True

    def _let_go_if_void(self, push: _Push, blocks: list[int]) -> None:
        """Its blocks are others, as it was preempted and resumed between two steps; or its sidecar is another one."""
        if push.leased != blocks[: len(push.leased)]:
            self._take_back(push)
        elif push.open and self._link.epoch not in ("", push.leases[-1][1]):
            push.open, push.leased = "", []

    def _take_back(self, push: _Push) -> None:
        """Preempted: its blocks are others' from now on. The decoder may still read them, but not confirm it."""
        push.num_done_blocks, push.leased = 0, []
        if push.open:
            logger.info("push_taken_back request_id=%s reason=preempted", push.request.request_id)
            self._link.revoke_now(push.open)
            push.open = ""

    def _why_not(self, request: Any) -> str:
        """Why a prompt is not asked for; "" if it is."""
        if self._fault or not self._consumes:
            return self._fault or "kv_role is kv_producer"
        return self._invalid(request.kv_transfer_params)

    @staticmethod
    def _invalid(params: Any) -> str:
        try:
            check_metaserver(params)
        except InvalidKvTransferParams as error:
            return str(error)
        return ""

    def _num_blocks(self, num_tokens: int) -> int:
        """Blocks that a decoder wants of a prompt: its last token is computed there."""
        return -(-(num_tokens - 1) // self._block_size)

    def _refuse(self, request: Any, reason: str) -> None:
        """The decoder waits for another prefiller, or for the end of its time."""
        self._refused[request.request_id] = reason
        logger.error("no_push request_id=%s reason=%s", request.request_id, reason)


def _is_loaded_by_others(request: Any, output: Any) -> bool:
    """Whether another connector (MultiConnector) fills some of a request's blocks from within its step: vLLM finds out
    afterwards whether that failed, and computes them once more. Versions that don't say so of the step say it of the
    request, which is then one of our own loads from a store at worst."""
    return not hasattr(output, "has_sync_kv_loads") and getattr(request, "num_external_computed_tokens", 0) > 0


def is_push(params: dict[str, Any] | None) -> bool:
    """True where KV is pushed, to this engine or by it."""
    return calls_metaserver(params) or wants_push(params)


def _is_of_a_list(params: dict[str, Any], name: str) -> bool:
    """Whether others wait for this prompt: our proxy says so, of another one only the first prompt is in doubt."""
    index = name.rpartition("-")[2] if name.startswith("cmpl-") else "0"
    num_children = params.get("num_children", 1)
    return index not in ("", "0") or (isinstance(num_children, int) and num_children > 1)

"""The prefix store as the scheduler uses it: what it has of a prompt, and which finished blocks it is given.

Loads are asynchronous (WAITING_FOR_REMOTE_KVS), as pulls are: a directory may take seconds, and a synchronous load, as
UCM does it, would hold up every other request of the step. Blocks are saved when their request has finished, held back
by vLLM until the sidecars have copied them: one order a request, and for a prefiller, whose requests end with their
prefill, no later than after each step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine_adapter.vllm_connector.content_names import Chain, items_of, root_of
from engine_adapter.vllm_connector.lora_names import LoraNames
from engine_adapter.vllm_connector.metadata import StoreLoadOrder, StoreSaveOrder
from engine_adapter.vllm_connector.scheduler_link import SchedulerLink

LOOKUP_TIMEOUT_S = 1.5
"""A sidecar answers within a second, by what its tiers have said; past this nobody waits for it."""
IDLE_WAIT_S = 0.005
"""vLLM steps without a pause while it is told to ask again; a step with nothing to compute waits this long."""
STALE_S = 5.0
"""An answer that old is asked for again: others may have saved more since."""
MAX_BLOCKS = 65_536
"""Of one message to the sidecar."""
NULL_BLOCK = 0
"""What vLLM puts where a request holds no block."""


@dataclass(slots=True)
class _Lookup:
    lookup_id: str
    asked_at: float
    end_block: int = 0
    """What was promised to vLLM last."""


class SchedulerStore:
    """Called on the scheduler's thread only. A store that is slow, full or away has nothing, and is given nothing."""

    def __init__(self, links: Sequence[SchedulerLink], block_size: int, computation: str) -> None:
        self._links = list(links)
        self._block_size = block_size
        self._computation = computation
        self._generation = ""
        self._loras = LoraNames()
        self._chains: dict[str, Chain | None] = {}
        """None for a request whose blocks have no name."""
        self._lookups: dict[str, _Lookup] = {}
        self._settled: set[str] = set()
        """Requests that are not looked up (again)."""
        self._num_lookups = 0

    @property
    def available(self) -> bool:
        return all(link.has_store for link in self._links)

    def expect(self, request: Any) -> None:
        """A request has come: ask, so that the answer is there when it is scheduled."""
        num_blocks = self._num_loadable(request)
        if num_blocks and request.request_id not in self._settled and self.available:
            self._ask(request, num_blocks)

    def num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond `num_computed_tokens` can be loaded; None while that is being found out."""
        request_id = request.request_id
        num_blocks = self._num_loadable(request)
        if request_id in self._settled or num_blocks * self._block_size <= num_computed_tokens or not self.available:
            return 0, False
        now = time.monotonic()
        lookup = self._lookups.get(request_id)
        if lookup is None or now - lookup.asked_at > STALE_S:
            lookup = self._ask(request, num_blocks)
        if lookup is None:
            return 0, False
        answers = [link.found(lookup.lookup_id) for link in self._links]
        if None in answers:
            return (None, False) if now - lookup.asked_at < LOOKUP_TIMEOUT_S else (0, False)
        lookup.end_block = min(num_blocks, *(answer for answer in answers if answer is not None))
        num_tokens = lookup.end_block * self._block_size - num_computed_tokens
        return (num_tokens, True) if num_tokens > 0 else (0, False)

    def wait_for_an_answer(self) -> None:
        """At most IDLE_WAIT_S, and only where one is due."""
        now = time.monotonic()
        for link in self._links:
            link.news.clear()
            due = (lookup for lookup in self._lookups.values() if now - lookup.asked_at < LOOKUP_TIMEOUT_S)
            if any(link.found(lookup.lookup_id) is None for lookup in due):
                link.news.wait(IDLE_WAIT_S)
                return

    def allocated(self, request: Any, block_ids: Sequence[int], num_external_tokens: int) -> StoreLoadOrder | None:
        """The request got its blocks: what to load into them. It is not looked up again, also if the load fails."""
        request_id = request.request_id
        lookup = self._lookups.get(request_id)
        self._settle(request_id)
        chain = self._chains.get(request_id)
        if lookup is None or chain is None or num_external_tokens <= 0:
            return None
        end = lookup.end_block
        first = end - num_external_tokens // self._block_size
        return StoreLoadOrder(request_id, tuple(chain.hashes[first:end]), tuple(block_ids[first:end]))

    def finished(self, request: Any, block_ids: Sequence[int], *, well: bool) -> StoreSaveOrder | None:
        """The request is over: which blocks to keep, whose ids stay the request's until that is done."""
        request_id = request.request_id
        chain = self._chain(request) if well and self.available else None
        self._settle(request_id)
        self._settled.discard(request_id)
        self._chains.pop(request_id, None)
        if chain is None:
            return None
        # The last token's KV is not computed; a step that runs ahead may count it all the same.
        num_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        num_blocks = min(num_tokens // self._block_size, len(block_ids), MAX_BLOCKS)
        held = list(block_ids[:num_blocks])
        held = held[: held.index(NULL_BLOCK)] if NULL_BLOCK in held else held
        hashes = chain.upto(request.all_token_ids, len(held))
        return StoreSaveOrder(request_id, tuple(hashes), tuple(held[: len(hashes)])) if hashes else None

    def change_names(self, generation: str) -> None:
        """What was kept so far is not to be found any more, as the weights may have changed (vLLM: reset_cache)."""
        self._generation = generation
        for request_id in list(self._lookups):
            self._settle(request_id)
        self._chains = dict.fromkeys(self._chains)  # computed with both

    def _num_loadable(self, request: Any) -> int:
        """Whole blocks, never the last token's: it is computed, so that there is something to sample from."""
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0
        num_tokens = int(request.num_tokens)
        return min((num_tokens - 1) // self._block_size, MAX_BLOCKS)

    def _ask(self, request: Any, num_blocks: int) -> _Lookup | None:
        request_id = request.request_id
        chain = self._chain(request)
        hashes = chain.upto(request.all_token_ids, num_blocks) if chain is not None else []
        self._forget(request_id)
        if not hashes:
            self._settled.add(request_id)
            return None
        self._num_lookups += 1
        lookup = self._lookups[request_id] = _Lookup(str(self._num_lookups), time.monotonic())
        for link in self._links:
            link.look_up(lookup.lookup_id, hashes)
        return lookup

    def _chain(self, request: Any) -> Chain | None:
        request_id = request.request_id
        if request_id not in self._chains:
            items, lora = items_of(request), self._loras.of(getattr(request, "lora_request", None))
            chain = None
            if items is not None and lora is not None:
                salt = getattr(request, "cache_salt", None)
                root = root_of(self._computation, self._block_size, salt, lora, self._generation)
                chain = Chain(root, self._block_size, items)
            self._chains[request_id] = chain
        return self._chains[request_id]

    def _settle(self, request_id: str) -> None:
        self._forget(request_id)
        self._settled.add(request_id)

    def _forget(self, request_id: str) -> None:
        if (lookup := self._lookups.pop(request_id, None)) is not None:
            for link in self._links:
                link.forget(lookup.lookup_id)

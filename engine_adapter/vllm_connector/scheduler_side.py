"""The connector inside vLLM's scheduler: which requests load KV, which hand theirs on, which leases are dropped.

Offers are made here, at the moment a request finishes, because its parameters travel with its answer; the workers,
whose sidecars report how offers end, are told with the next step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from engine_adapter.kv_transfer_params import (
    InvalidKvTransferParams,
    KvSource,
    RemotePrefill,
    parse_remote_prefill,
    wants_remote_decode,
    wants_remote_prefill,
)
from engine_adapter.push_params import calls_metaserver
from engine_adapter.sidecar_link import SidecarLink, pull_source
from engine_adapter.vllm_connector.compat import ABORTED_LOAD_KEEPS_ITS_BLOCKS, finished_well
from engine_adapter.vllm_connector.metadata import BatonMetadata, OfferNote, PullOrder
from engine_adapter.vllm_connector.scheduler_push import SchedulerPush, is_push
from engine_adapter.vllm_connector.scheduler_store import SchedulerStore
from engine_adapter.vllm_connector.staged_offers import StagedOffers
from sidecar.errors import SidecarError
from sidecar.protocol import Offer, pack_block_ids

logger = logging.getLogger(__name__)

Finished = tuple[bool, dict[str, Any] | None]
"""Whether blocks stay until they are reported as sent, and the parameters of the answer."""


class SchedulerSide:
    """Called on the scheduler's thread only. `links` has one joined sidecar a tensor-parallel rank."""

    def __init__(
        self,
        links: Sequence[SidecarLink],
        kv_role: str,
        block_size: int,
        lease_s: float,
        *,
        staged: StagedOffers | None = None,
        store: SchedulerStore | None = None,
        push: SchedulerPush | None = None,
    ) -> None:
        self._links = list(links)
        self._produces = kv_role != "kv_consumer"
        self._consumes = kv_role != "kv_producer"
        self._block_size = block_size
        self._lease_s = lease_s
        self._store = store
        self._push = push
        self._settled: set[str] = set()
        """Requests whose lease was given to the workers or dropped: nothing more is to be done about it."""
        self._loading: set[str] = set()
        self._meta = BatonMetadata()
        self._staged = staged or StagedOffers(kv_role, block_size)

    def num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond `num_computed_tokens` can be loaded; None for "ask again". May be called often."""
        if self._push is not None and calls_metaserver(request.kv_transfer_params):
            return self._push.num_new_matched_tokens(request, num_computed_tokens)
        if self._asks_store(request):
            assert self._store is not None
            return self._store.num_new_matched_tokens(request, num_computed_tokens)
        remote = self._to_load(request)
        num_tokens = self._loadable(request, remote) - num_computed_tokens if remote else 0
        return (num_tokens, True) if num_tokens > 0 else (0, False)

    def allocated(self, request: Any, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """The request got its blocks: load, or let the lease go if nothing of it is wanted."""
        if self._push is not None and calls_metaserver(request.kv_transfer_params):
            if (land := self._push.allocated(request, block_ids, num_external_tokens)) is not None:
                self._loading.update([request.request_id] if land.local_block_ids else ())
                self._meta.lands.append(land)
            return
        if self._push is not None:
            self._push.follow(request)
        if self._produces and not is_push(request.kv_transfer_params):
            self._staged.follow(request)
        if self._asks_store(request):
            assert self._store is not None
            if (order := self._store.allocated(request, block_ids, num_external_tokens)) is not None:
                self._loading.add(request.request_id)
                self._meta.store_loads.append(order)
            return
        remote = self._to_load(request)
        if remote is None:
            return
        self._settled.add(request.request_id)
        if num_external_tokens <= 0:
            if not _releases(request):
                logger.warning(
                    "recomputing request_id=%s prompt_tokens=%d lease_tokens=%d lease_blocks=%d",
                    request.request_id, request.num_tokens, remote.num_tokens, len(remote.block_ids),
                )  # fmt: skip
            self._drop(remote)
            return
        end = self._loadable(request, remote)
        first = (end - num_external_tokens) // self._block_size
        local = tuple(block_ids[first : self._num_blocks(end)])
        self._loading.add(request.request_id)
        self._meta.pulls.append(
            PullOrder(
                request.request_id, remote.sources, len(remote.block_ids), local, first,
                pack_block_ids(remote.block_ids),
            )
        )  # fmt: skip

    def next_meta(self, scheduler_output: Any = None, *, idle: bool = False) -> BatonMetadata:
        """What the workers are to be told with this step; `idle` where it computes nothing."""
        if idle and self._store is not None:
            self._store.wait_for_an_answer()
        for link in self._links:
            link.poll()
        self._meta.stages += self._staged.step(scheduler_output)
        if self._push is not None:
            self._meta.marks += self._push.step(scheduler_output)
        meta, self._meta = self._meta, BatonMetadata()
        return meta

    def received(self, request_ids: Sequence[str]) -> None:
        """The workers have reported these loads."""
        self._loading.difference_update(request_ids)

    def sent(self, request_ids: Sequence[str]) -> None:
        """The workers have reported these requests' offers as ended."""
        self._staged.free(request_ids)

    def new_request(self, request: Any) -> None:
        """A request that only gives a lease back is done with here."""
        if self._asks_store(request):
            assert self._store is not None
            self._store.expect(request)
            return
        remote = self._to_load(request)
        if remote is not None and _releases(request):
            self._settled.add(request.request_id)
            self._drop(remote)

    def finished(self, request: Any, block_ids: Sequence[int]) -> Finished:
        """The request is over: hand its KV on and keep it, or stop its load, or give an unread lease back."""
        delayed, params = self._handed_on(request, block_ids)
        self._staged.forget(request.request_id)
        if params is None:
            self._staged.free([request.request_id])
        saved = None
        if self._store is not None:
            well = finished_well(request) and self._asks_store(request)  # else a peer has computed some of it
            saved = self._store.finished(request, block_ids, well=well)
        if saved is not None:
            self._meta.store_saves.append(saved)
        return delayed or saved is not None, params

    def _handed_on(self, request: Any, block_ids: Sequence[int]) -> Finished:
        request_id = request.request_id
        pushed, told = self._push.finished(request, block_ids) if self._push is not None else ([], None)
        unread = self._to_load(request)
        self._settled.discard(request_id)
        if request_id in self._loading:
            self._loading.discard(request_id)
            self._meta.abandoned.append(request_id)
            if not ABORTED_LOAD_KEEPS_ITS_BLOCKS:
                self._meta.abandoned_as_sent.append(request_id)
                return True, None
            return False, None
        if unread is not None:
            self._drop(unread)
            return False, None
        self._meta.offers += pushed
        if pushed or is_push(request.kv_transfer_params):
            return bool(pushed), told
        if not wants_remote_decode(request.kv_transfer_params) or not finished_well(request):
            return False, None
        if not self._produces:
            logger.warning("no_hand_off request_id=%s reason=kv_role is kv_consumer", request_id)
            return False, None
        return self._offer(request, block_ids)

    def forget_stored(self, generation: str) -> None:
        """What the store has is of no use any more."""
        if self._store is not None:
            self._store.change_names(generation)

    def close(self) -> None:
        """Let go of the sidecars."""
        for link in self._links:
            link.close()

    def _asks_store(self, request: Any) -> bool:
        """A request that comes with a lease never does: its KV is elsewhere, or was not to be had."""
        return self._store is not None and not wants_remote_prefill(request.kv_transfer_params)

    def _to_load(self, request: Any) -> RemotePrefill | None:
        """The lease a request comes with; None if it has none, or it is settled already."""
        params = request.kv_transfer_params
        if not wants_remote_prefill(params) or is_push(params) or request.request_id in self._settled:
            return None
        try:
            remote = parse_remote_prefill(params)
        except InvalidKvTransferParams as error:
            self._settled.add(request.request_id)
            logger.warning("recomputing request_id=%s reason=%s", request.request_id, error)
            return None
        return remote

    def _loadable(self, request: Any, remote: RemotePrefill) -> int:
        """Up to which of its tokens a request can be loaded; 0 if the lease can't be this prompt's."""
        if _releases(request) or not self._consumes:
            return 0
        if len(remote.block_ids) != self._num_blocks(remote.num_tokens) or remote.num_tokens > request.num_tokens:
            return 0
        if remote.num_tokens == request.num_tokens:
            return remote.num_tokens
        return remote.num_tokens - remote.num_tokens % self._block_size

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _drop(self, remote: RemotePrefill) -> None:
        for source in remote.sources:
            self._links[0].drop(pull_source(source, len(remote.block_ids)))

    def _offer(self, request: Any, block_ids: Sequence[int]) -> Finished:
        num_tokens = min(request.num_prompt_tokens, request.num_computed_tokens)
        offered: list[int] | None = list(block_ids[: self._num_blocks(num_tokens)])
        if self._staged.on:
            offered = self._staged.take(request.request_id, self._num_blocks(num_tokens))
        if offered is None:
            logger.error("no_hand_off request_id=%s reason=the staging buffer was full", request.request_id)
            return False, None
        offers: list[tuple[SidecarLink, Offer]] = []
        sources: list[KvSource] = []
        for rank, link in enumerate(self._links):
            link.poll()
            client = link.client
            try:
                if client is None:
                    raise SidecarError(f"the sidecar of rank {rank} is away")
                offer = client.offer(request.request_id, offered, num_tokens, self._lease_s)
            except SidecarError as error:
                logger.error("no_hand_off request_id=%s reason=%s", request.request_id, error)
                self._take_back(request.request_id, offers)
                return bool(offers), None
            hello = client.hello
            offers.append((link, offer))
            sources.append(
                KvSource(hello.engine_id, hello.host, hello.port, offer.transfer_id, offer.token, offer.epoch)
            )
        self._note(request.request_id, offers)
        first = sources[0]
        remote = RemotePrefill(
            engine_id=first.engine_id,
            request_id=request.request_id,
            host=first.host,
            port=first.port,
            block_ids=tuple(offered),
            num_tokens=num_tokens,
            num_cached_tokens=max(0, getattr(request, "num_cached_tokens", 0)),
            expires_at=offers[0][1].expires_at,
            transfer_id=first.transfer_id,
            token=first.token,
            epoch=first.epoch,
            other_ranks=tuple(sources[1:]),
        )
        return True, remote.to_wire()

    def _take_back(self, request_id: str, offers: Sequence[tuple[SidecarLink, Offer]]) -> None:
        """Some rank refused: void the others' offers. Their ends are reported like any other's."""
        for link, offer in offers:
            link.revoke(offer.transfer_id)
        if offers:
            self._note(request_id, offers)

    def _note(self, request_id: str, offers: Sequence[tuple[SidecarLink, Offer]]) -> None:
        leases = tuple((offer.transfer_id, offer.epoch) for _, offer in offers)
        self._meta.offers.append(OfferNote(request_id, leases))


def _releases(request: Any) -> bool:
    """True where nobody wants the KV any more and the request only says so (proxy: reclaim)."""
    return bool((request.kv_transfer_params or {}).get("release_only"))

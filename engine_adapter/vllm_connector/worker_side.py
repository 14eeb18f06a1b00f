"""The connector inside one worker: gives the KV cache to its sidecar, starts loads, reports what has ended, once."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

from engine_adapter.memory.staged_link import StagedLink
from engine_adapter.sidecar_link import SidecarLink, pull_source
from engine_adapter.vllm_connector.metadata import (
    BatonMetadata,
    LandOrder,
    OfferNote,
    PullOrder,
    StoreLoadOrder,
    StoreSaveOrder,
)
from engine_adapter.vllm_connector.worker_push import WorkerLandings
from sidecar.protocol import (
    OfferEnded,
    PullEnded,
    SidecarLost,
    StoreAbandon,
    StoreLoad,
    StoreLoadEnded,
    StoreSave,
    StoreSaveEnded,
)

logger = logging.getLogger(__name__)

STRANGE_EPOCH_S = 10.0
"""An offer of another registration than the one that is up is void; this much later nobody doubts which one is up."""
IDLE_WAIT_S = 0.005
"""vLLM steps without a pause while loads or leases are out; a step with nothing to compute waits for news this long."""
FENCE_GRACE_S = 10.0
"""As SidecarLink's, and longer: the engine's own spinning can keep a sidecar that is well from its core."""
SAVE_TIMEOUT_S = 60.0
"""A save is a copy between two places in memory; a sidecar that takes this long hangs."""
UNKILLABLE_S = 30.0
"""A sidecar that hangs for this long after it should have been killed can't be (another container's): see `poll`."""


class SidecarHangs(RuntimeError):
    """The sidecar may still write into blocks and can't be stopped: going on would risk wrong answers."""


@dataclass(slots=True)
class Ended:
    """Request ids for vLLM, each reported exactly once. Failed loads are also in `received`.

    A load from the prefix store that came short is no failed one: only its `missing_blocks` are computed.
    """

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    missing_blocks: set[int] = field(default_factory=set)


class WorkerSide:
    """Called on the worker's thread only. `rank` is the tensor-parallel one; `news` is set by the link's wake."""

    def __init__(
        self,
        link: SidecarLink | StagedLink,
        rank: int,
        pull_timeout_s: float,
        news: threading.Event,
        store_timeout_s: float = 5.0,
        landings: WorkerLandings | None = None,
    ) -> None:
        self._link = link
        self._news = news
        self._rank = rank
        self._pull_timeout_s = pull_timeout_s
        self._store_timeout_s = store_timeout_s
        self._landings = landings
        self._loads: dict[str, PullOrder | LandOrder | StoreLoadOrder] = {}
        self._held: Counter[str] = Counter()
        """By request, who still reads its blocks: an offer, a save, or both. It is sent when nobody does."""
        self._as_sent: set[str] = set()
        self._offers: dict[str, OfferNote] = {}
        self._ended_before_noted: set[str] = set()
        self._lost_epochs: set[str] = set()
        self._known_epoch = link.epoch
        self._strange_since: dict[str, float] = {}
        self._ended = Ended()

    def begin(self, meta: BatonMetadata) -> None:
        """Take one step's orders."""
        self._held.update(note.request_id for note in meta.offers)
        self._held.update(save.request_id for save in meta.store_saves)
        for note in meta.offers:
            self._note(note)
        for save in meta.store_saves:
            self._save(save)
        for order in meta.pulls:
            self._load(order)
        for land in meta.lands:
            self._land(land)
        for load in meta.store_loads:
            self._load_stored(load)
        self._as_sent.update(meta.abandoned_as_sent)
        for request_id in meta.abandoned:
            if request_id in self._loads:
                self._abandon(request_id)
            elif request_id in self._as_sent:
                # Its load has ended and was reported in the same step as the abort: only the send is left to report.
                self._as_sent.discard(request_id)
                self._ended.sent.add(request_id)

    def poll(self, may_wait: bool = False) -> Ended:
        """What has ended since the last call. Raises SidecarHangs."""
        if may_wait and self._ended == Ended() and (self._loads or self._held):
            self._news.wait(IDLE_WAIT_S)
        self._news.clear()
        if self._landings is not None:
            self._landings.abandon_failed()
        for event in self._link.poll():
            if isinstance(event, PullEnded):
                self._pull_ended(event)
            elif isinstance(event, StoreLoadEnded):
                self._stored_load_ended(event)
            elif isinstance(event, StoreSaveEnded):
                self._save_ended(event)
            elif isinstance(event, OfferEnded):
                self._offer_ended(event.transfer_id)
            elif isinstance(event, SidecarLost):
                self._lose_epoch()
        self._known_epoch = self._link.epoch or self._known_epoch
        self._sweep_strange(time.monotonic())
        if self._link.overdue_s() > UNKILLABLE_S:
            raise SidecarHangs("the sidecar neither ends its transfers nor can be killed; restart it and this engine")
        ended, self._ended = self._ended, Ended()
        return ended

    def close(self) -> None:
        """Let the sidecar go."""
        if self._landings is not None:
            self._landings.close()
        self._link.close()

    def _load(self, order: PullOrder) -> None:
        self._loads[order.request_id] = order
        sources = [pull_source(source, order.num_blocks, order.packed_block_ids) for source in order.sources]
        self._link.pull(
            order.request_id, sources, list(order.local_block_ids), order.first_block, self._pull_timeout_s
        )  # fmt: skip

    def _land(self, order: LandOrder) -> None:
        assert self._landings is not None, "a landing was ordered of an engine that is not told to take part"
        if order.local_block_ids:
            self._loads[order.request_id] = order
        self._landings.land(order)

    def _load_stored(self, order: StoreLoadOrder) -> None:
        self._loads[order.request_id] = order
        request = StoreLoad(order.request_id, list(order.hashes), list(order.local_block_ids), self._store_timeout_s)
        self._ask_store(request, self._store_timeout_s)

    def _save(self, order: StoreSaveOrder) -> None:
        request = StoreSave(order.request_id, list(order.hashes), list(order.block_ids))
        self._ask_store(request, SAVE_TIMEOUT_S)

    def _abandon(self, request_id: str) -> None:
        if isinstance(self._loads[request_id], StoreLoadOrder):
            self._ask_store(StoreAbandon(request_id), 0.0)
        else:
            self._link.abandon(request_id)

    def _stored_load_ended(self, event: StoreLoadEnded) -> None:
        order = self._loads.pop(event.load_id, None)
        if order is None:
            return
        num_blocks = len(order.local_block_ids)
        logger.log(
            logging.DEBUG if event.num_blocks == num_blocks else logging.WARNING,
            "kv_load_from_store request_id=%s blocks=%d of=%d bytes=%d seconds=%.4f tiers=%s reason=%s message=%s",
            event.load_id, event.num_blocks, num_blocks, event.num_bytes, event.seconds, event.tiers, event.reason,
            event.message,
        )  # fmt: skip
        if self._received(event.load_id):
            self._ended.missing_blocks.update(order.local_block_ids[event.num_blocks :])

    def _save_ended(self, event: StoreSaveEnded) -> None:
        logger.debug(
            "kv_saved request_id=%s blocks=%d known=%d message=%s",
            event.save_id, event.num_blocks, event.num_known, event.message,
        )  # fmt: skip
        self._let_go(event.save_id)

    def _let_go(self, request_id: str) -> None:
        """One reader less."""
        self._held[request_id] -= 1
        if self._held[request_id] <= 0:
            del self._held[request_id]
            self._ended.sent.add(request_id)

    def _received(self, request_id: str) -> bool:
        """A load has ended; False where vLLM knows it as something that is sent."""
        if request_id in self._as_sent:
            self._as_sent.discard(request_id)
            self._ended.sent.add(request_id)
            return False
        self._ended.received.add(request_id)
        return True

    def _ask_store(self, request: StoreLoad | StoreAbandon | StoreSave, within_s: float) -> None:
        cast(SidecarLink, self._link).ask_store(request, within_s)  # with staged KV a store is refused at start

    def _pull_ended(self, event: PullEnded) -> None:
        order = self._loads.pop(event.pull_id, None)
        if order is None:
            return
        why = self._landings.ended(event.pull_id) if self._landings is not None else ""
        if event.ok:
            logger.debug(
                "kv_loaded request_id=%s blocks=%d bytes=%d seconds=%.4f transport=%s peer=%s",
                event.pull_id, event.num_blocks, event.num_bytes, event.seconds, event.transport, event.peer,
            )  # fmt: skip
        else:
            logger.warning(
                "kv_load_failed request_id=%s peer=%s reason=%s message=%s",
                event.pull_id, event.peer, "metaserver" if why else event.reason, why or event.message,
            )  # fmt: skip
        if self._received(event.pull_id) and not event.ok:
            self._ended.failed.add(event.pull_id)
            self._ended.failed_blocks.update(order.local_block_ids)

    def _note(self, note: OfferNote) -> None:
        if self._rank >= len(note.leases):  # an earlier rank refused, so this one was never asked
            self._let_go(note.request_id)
            return
        transfer_id, epoch = note.leases[self._rank]
        if transfer_id in self._ended_before_noted or epoch in self._lost_epochs:
            self._ended_before_noted.discard(transfer_id)
            self._let_go(note.request_id)
            return
        self._offers[transfer_id] = note

    def _offer_ended(self, transfer_id: str) -> None:
        note = self._offers.pop(transfer_id, None)
        self._strange_since.pop(transfer_id, None)
        if note is None:
            self._ended_before_noted.add(transfer_id)
        else:
            self._let_go(note.request_id)

    def _lose_epoch(self) -> None:
        """The sidecar is gone and its offers are void: nobody can confirm a read any more."""
        self._lost_epochs.add(self._known_epoch)
        self._ended_before_noted.clear()
        void = [transfer_id for transfer_id, note in self._offers.items() if self._epoch(note) in self._lost_epochs]
        logger.warning("offers_void num=%d", len(void))
        for transfer_id in void:
            self._offer_ended(transfer_id)

    def _sweep_strange(self, now: float) -> None:
        """Offers of a registration that came and went without our seeing it."""
        current = self._link.epoch
        if not current:
            return
        strange = [transfer_id for transfer_id, note in self._offers.items() if self._epoch(note) != current]
        for transfer_id in strange:
            if now - self._strange_since.setdefault(transfer_id, now) > STRANGE_EPOCH_S:
                self._offer_ended(transfer_id)

    def _epoch(self, note: OfferNote) -> str:
        return note.leases[self._rank][1]

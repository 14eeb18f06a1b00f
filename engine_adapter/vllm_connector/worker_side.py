"""The connector inside one worker: gives the KV cache to its sidecar, starts loads, reports what has ended, once."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from engine_adapter.memory.staged_link import StagedLink
from engine_adapter.sidecar_link import SidecarLink, pull_source
from engine_adapter.vllm_connector.metadata import BatonMetadata, OfferNote, PullOrder
from sidecar.protocol import OfferEnded, PullEnded, SidecarLost

logger = logging.getLogger(__name__)

STRANGE_EPOCH_S = 10.0
"""An offer of another registration than the one that is up is void; this much later nobody doubts which one is up."""
IDLE_WAIT_S = 0.005
"""vLLM steps without a pause while loads or leases are out; a step with nothing to compute waits for news this long."""
FENCE_GRACE_S = 10.0
"""As SidecarLink's, and longer: the engine's own spinning can keep a sidecar that is well from its core."""
UNKILLABLE_S = 30.0
"""A sidecar that hangs for this long after it should have been killed can't be (another container's): see `poll`."""


class SidecarHangs(RuntimeError):
    """The sidecar may still write into blocks and can't be stopped: going on would risk wrong answers."""


@dataclass(slots=True)
class Ended:
    """Request ids for vLLM, each reported exactly once. Failed loads are also in `received`."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


class WorkerSide:
    """Called on the worker's thread only. `rank` is the tensor-parallel one; `news` is set by the link's wake."""

    def __init__(self, link: SidecarLink | StagedLink, rank: int, pull_timeout_s: float, news: threading.Event) -> None:
        self._link = link
        self._news = news
        self._rank = rank
        self._pull_timeout_s = pull_timeout_s
        self._loads: dict[str, PullOrder] = {}
        self._as_sent: set[str] = set()
        self._offers: dict[str, OfferNote] = {}
        self._ended_before_noted: set[str] = set()
        self._lost_epochs: set[str] = set()
        self._known_epoch = link.epoch
        self._strange_since: dict[str, float] = {}
        self._ended = Ended()

    def begin(self, meta: BatonMetadata) -> None:
        """Take one step's orders."""
        for note in meta.offers:
            self._note(note)
        for order in meta.pulls:
            self._load(order)
        self._as_sent.update(meta.abandoned_as_sent)
        for request_id in meta.abandoned:
            if request_id in self._loads:
                self._link.abandon(request_id)
            elif request_id in self._as_sent:
                # Its load has ended and was reported in the same step as the abort: only the send is left to report.
                self._as_sent.discard(request_id)
                self._ended.sent.add(request_id)

    def poll(self, may_wait: bool = False) -> Ended:
        """What has ended since the last call. Raises SidecarHangs."""
        if may_wait and self._ended == Ended() and (self._loads or self._offers):
            self._news.wait(IDLE_WAIT_S)
        self._news.clear()
        for event in self._link.poll():
            if isinstance(event, PullEnded):
                self._pull_ended(event)
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
        self._link.close()

    def _load(self, order: PullOrder) -> None:
        self._loads[order.request_id] = order
        sources = [pull_source(source, order.num_blocks) for source in order.sources]
        self._link.pull(
            order.request_id, sources, list(order.local_block_ids), order.first_block, self._pull_timeout_s
        )  # fmt: skip

    def _pull_ended(self, event: PullEnded) -> None:
        order = self._loads.pop(event.pull_id, None)
        if order is None:
            return
        if event.ok:
            logger.debug(
                "kv_loaded request_id=%s blocks=%d bytes=%d seconds=%.4f transport=%s peer=%s",
                event.pull_id, event.num_blocks, event.num_bytes, event.seconds, event.transport, event.peer,
            )  # fmt: skip
        else:
            logger.warning(
                "kv_load_failed request_id=%s peer=%s reason=%s message=%s",
                event.pull_id, event.peer, event.reason, event.message,
            )  # fmt: skip
        if event.pull_id in self._as_sent:
            self._as_sent.discard(event.pull_id)
            self._ended.sent.add(event.pull_id)
            return
        self._ended.received.add(event.pull_id)
        if not event.ok:
            self._ended.failed.add(event.pull_id)
            self._ended.failed_blocks.update(order.local_block_ids)

    def _note(self, note: OfferNote) -> None:
        if self._rank >= len(note.leases):  # an earlier rank refused, so this one was never asked
            self._ended.sent.add(note.request_id)
            return
        transfer_id, epoch = note.leases[self._rank]
        if transfer_id in self._ended_before_noted or epoch in self._lost_epochs:
            self._ended_before_noted.discard(transfer_id)
            self._ended.sent.add(note.request_id)
            return
        self._offers[transfer_id] = note

    def _offer_ended(self, transfer_id: str) -> None:
        note = self._offers.pop(transfer_id, None)
        self._strange_since.pop(transfer_id, None)
        if note is None:
            self._ended_before_noted.add(transfer_id)
        else:
            self._ended.sent.add(note.request_id)

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

"""Layerwise push inside one worker: landings with their calls to the metaserver, and marks from within the forward."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from engine_adapter.mark_pace import MarkPace
from engine_adapter.metaserver_calls import MetaserverCalls
from engine_adapter.push_params import nothing_wanted
from engine_adapter.sidecar_link import SidecarLink, push_landing
from engine_adapter.vllm_connector.metadata import LandOrder, MarkOrder
from sidecar.protocol import KvLayout, Ready

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """See device.Progress."""

    def now(self) -> Callable[[], bool]: ...

    def wait(self) -> None: ...


class WorkerLandings:
    """A decoder's. A landing ends like a pull, by a PullEnded from the link; see WorkerSide."""

    def __init__(self, link: SidecarLink, block_size: int, push_timeout_s: float, news: threading.Event) -> None:
        self._link = link
        self._block_size = block_size
        self._push_timeout_s = push_timeout_s
        self._metaserver = MetaserverCalls(news.set)
        self._waiting: dict[str, str] = {}
        """By request, why it can't be filled, "" as long as it can."""

    def land(self, order: LandOrder) -> None:
        """Keep the blocks and have them filled; one PullEnded follows, always, unless nothing is wanted."""
        if not order.local_block_ids:
            nothing = nothing_wanted(order.name, self._block_size, order.num_tokens)
            self._metaserver.post(order.metaserver, "", nothing.to_wire())
            return
        local = list(order.local_block_ids)
        landed = self._link.land(order.request_id, local, order.first_block, self._push_timeout_s)
        landing = push_landing(
            self._link, landed, order.name, local, self._block_size, order.num_tokens, order.first_block
        )
        if landing is not None:
            self._waiting[order.request_id] = ""
            self._metaserver.post(order.metaserver, order.request_id, landing.to_wire())

    def abandon_failed(self) -> None:
        """End the landings that nobody was asked to fill."""
        for request_id, why in self._metaserver.take_failed():
            if request_id in self._waiting:
                self._waiting[request_id] = why
                self._link.abandon(request_id)

    def ended(self, request_id: str) -> str:
        """It has: why it had to be abandoned, if that was the metaserver."""
        return self._waiting.pop(request_id, "")

    def close(self) -> None:
        """End every call."""
        self._metaserver.close()


class LayerMarks:
    """A prefiller's: what of each push lies in the pool, told from within vLLM's hooks around the layers.

    With `by_layer` False it is told at the end of a forward only: where the hooks of a layer may come before all of it
    is written. On a device a hook comes when a layer is queued: a mark waits until it is computed, see Progress.
    """

    def __init__(self, link: SidecarLink, layers: Sequence[str], layout: KvLayout, progress: Progress, *,
                 by_layer: bool = True) -> None:  # fmt: skip
        self._link = link
        self._layers = list(layers)
        self._layer_bytes = layout.block_bytes // layout.num_layers
        self._progress = progress
        self._by_layer = by_layer
        self._orders: list[tuple[MarkOrder, MarkPace]] = []
        self._written: set[str] = set()
        self._num_layers = 0
        """So many of the first layers are written in this step."""
        self._queued: deque[tuple[Callable[[], bool], str, Ready, tuple[int, ...]]] = deque()
        self._warned = False

    def begin(self, orders: Sequence[MarkOrder]) -> None:
        """A step begins."""
        strips = [order for order in orders if order.first_block < order.end_block]
        self._orders = [(order, MarkPace(self._layer_bytes)) for order in strips]
        self._written.clear()
        self._num_layers = 0
        for order in orders:
            self._queue(order, 0, self._progress.now(), order.more_block_ids)
        self._flush()

    def layer_written(self, layer: str) -> None:
        """vLLM has run this layer's attention; its keys and values of all requests of the step are written."""
        if not self._orders or not self._by_layer:
            return
        self._written.add(layer)
        before = self._num_layers
        while self._num_layers < len(self._layers) and self._layers[self._num_layers] in self._written:
            self._num_layers += 1
        if self._num_layers > before:
            self._mark(self._num_layers)

    def step_ended(self) -> None:
        """The forward has ended: all of the step's pushes are computed, unless it has failed."""
        if self._orders and self._num_layers < len(self._layers) and sys.exc_info()[0] is None:
            if self._by_layer and not self._warned:
                self._warned = True
                logger.warning(
                    "push_not_by_layer layers_seen=%d of=%d remedy=--enforce-eager or cudagraph_mode PIECEWISE",
                    self._num_layers, len(self._layers),
                )  # fmt: skip
            self._mark(len(self._layers))
        if self._orders and self._queued:
            self._progress.wait()
            self._flush()
        self._orders = []

    def _mark(self, num_layers: int) -> None:
        last = num_layers == len(self._layers)
        due = [order for order, pace in self._orders if pace.is_due(order.end_block - order.first_block, last=last)]
        if due:
            is_done = self._progress.now()
            for order in due:
                self._queue(order, num_layers, is_done)
        self._flush()

    def _queue(
        self, order: MarkOrder, num_layers: int, is_done: Callable[[], bool], more: tuple[int, ...] = ()
    ) -> None:
        end_block = order.end_block if num_layers else order.first_block
        self._queued.append((is_done, order.transfer_id, Ready(order.first_block, end_block, num_layers), more))

    def _flush(self) -> None:
        while self._queued and self._queued[0][0]():
            _, transfer_id, ready, more = self._queued.popleft()
            self._link.mark_ready(transfer_id, ready, more)

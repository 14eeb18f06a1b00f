"""The sidecar's prefix store as the engine core knows it."""

from __future__ import annotations

from collections.abc import Callable

from engine_adapter.sidecar_link import SidecarLink
from engine_adapter.torch_engine.prefix_store import LoadResult, StoreEvents
from sidecar.protocol import StoreAbandon, StoreEvent, StoreLoad, StoreLoadEnded, StoreSave, StoreSaveEnded

SAVE_TIMEOUT_S = 60.0
"""A save is a copy between two places in memory; a sidecar that takes this long hangs."""


class SidecarPrefixStore:
    """A PrefixStore (see prefix_store.py) over the link to the sidecar, whose poller hands events to `take`."""

    def __init__(self, link: SidecarLink, load_timeout_s: float, observe_load: Callable[[LoadResult], None]) -> None:
        self._link = link
        self._load_timeout_s = load_timeout_s
        self._observe_load = observe_load
        self._loads: list[LoadResult] = []
        self._ended_saves: list[str] = []

    @property
    def available(self) -> bool:
        return bool((client := self._link.client) is not None and client.hello.store)

    def load(self, request_id: str, block_hashes: list[bytes], block_ids: list[int]) -> None:
        request = StoreLoad(request_id, block_hashes, block_ids, self._load_timeout_s)
        self._link.ask_store(request, self._load_timeout_s)

    def abandon(self, request_id: str) -> None:
        self._link.ask_store(StoreAbandon(request_id), 0.0)

    def save(self, save_id: str, block_hashes: list[bytes], block_ids: list[int]) -> None:
        self._link.ask_store(StoreSave(save_id, block_hashes, block_ids), SAVE_TIMEOUT_S)

    def take(self, event: StoreEvent) -> None:
        """What the link has heard."""
        if isinstance(event, StoreLoadEnded):
            result = LoadResult(
                event.load_id, event.num_blocks, event.reason, event.num_bytes, event.seconds, event.tiers
            )
            self._observe_load(result)
            self._loads.append(result)
        elif isinstance(event, StoreSaveEnded):
            self._ended_saves.append(event.save_id)

    def poll(self) -> StoreEvents:
        events = StoreEvents(self._loads, self._ended_saves)
        self._loads, self._ended_saves = [], []
        return events

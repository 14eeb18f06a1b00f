"""What one engine has asked of the store: lookups, loads and saves under way on its registered pool."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from sidecar.copy_executor import CopyExecutor, CopyJob, Move
from sidecar.message import Message
from sidecar.registration import Registration
from sidecar.store.block_store import BlockStore
from sidecar.store.keys import BlockKey, namespace_of
from sidecar.store.load import Copy, Load, Piece, gather
from sidecar.store.messages import (
    StoreAbandon,
    StoreFound,
    StoreLoad,
    StoreLoadEnded,
    StoreLookup,
    StoreRequest,
    StoreSave,
    StoreSaveEnded,
    store_refusal,
)  # fmt: skip

logger = logging.getLogger(__name__)

LOOKUP_TIMEOUT_S = 1.0
"""Past this a lookup is answered by what the tiers said that did answer."""
MAX_OPEN = 4096
"""Loads of one engine, and saves, and lookups, that may be under way at once."""

Send = Callable[[Message], None]


class StoreTable:
    """Lives as long as the registration; belongs to the event loop."""

    def __init__(self, store: BlockStore, registration: Registration, rank: int, executor: CopyExecutor) -> None:
        self._store = store
        self._registration = registration
        self._layout = registration.layout
        self._namespace = namespace_of(registration.layout, rank)
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._loads: dict[str, _OpenLoad] = {}
        self._saves: dict[str, CopyJob] = {}
        self._lookups: set[asyncio.Task[None]] = set()
        self._closing = ""

    def handle(self, request: StoreRequest, send: Send, *, may_write: bool) -> None:
        """Begin what was asked; `send` gets the answer. Only who registered the pool may load and save."""
        if isinstance(request, StoreLookup):
            self._lookup(request, send)
        elif isinstance(request, StoreAbandon):
            if (opened := self._loads.get(request.load_id)) is not None:
                opened.load.close("abandoned")
        elif isinstance(request, StoreLoad):
            self._load(request, send, may_write)
        else:
            self._save(request, send, may_write)

    async def close(self, why: str) -> None:
        """End every load and save; when this returns nothing reads or writes the pool."""
        self._closing = why
        for task in list(self._lookups):
            task.cancel()
        for opened in list(self._loads.values()):
            opened.load.close("sidecar_lost")
        for job in list(self._saves.values()):
            self._executor.stop(job)
        waiting = [opened.ended for opened in self._loads.values()]
        while self._saves or waiting:
            if waiting:
                await asyncio.wait(waiting)
                waiting = []
            await asyncio.sleep(0.001 if self._saves else 0)

    def _keys(self, hashes: Sequence[bytes]) -> list[BlockKey]:
        return [BlockKey(self._namespace, block_hash) for block_hash in hashes]

    def _pieces(self, block_id: int) -> list[Piece]:
        base = self._registration.region.address
        return [(base + p.offset + block_id * p.stride_bytes, p.block_bytes) for p in self._layout.planes]

    def _fault(
        self, hashes: Sequence[bytes], block_ids: Sequence[int], open_ids: Mapping[str, object], own_id: str
    ) -> str:
        """Why a load or a save can't be; "" if it can."""
        if self._closing:
            return self._closing
        if len(hashes) != len(block_ids):
            return f"{len(hashes)} hashes for {len(block_ids)} blocks"
        if block_ids and max(block_ids) >= self._layout.num_blocks:
            return f"block {max(block_ids)} is not in the pool of {self._layout.num_blocks} blocks"
        if len(set(block_ids)) != len(block_ids):
            return "a block id occurs twice"
        if own_id in open_ids:
            return f"{own_id!r} is open already"
        return f"{MAX_OPEN} are open already" if len(open_ids) >= MAX_OPEN else ""

    def _lookup(self, request: StoreLookup, send: Send) -> None:
        if len(self._lookups) >= MAX_OPEN:
            send(StoreFound(request.lookup_id, 0, {}))
            return
        task = asyncio.ensure_future(self._find(request, send))
        self._lookups.add(task)
        task.add_done_callback(self._lookups.discard)

    async def _find(self, request: StoreLookup, send: Send) -> None:
        where = await self._store.find(self._keys(request.hashes), LOOKUP_TIMEOUT_S)
        tiers = {name: where.count(name) for name in self._store.names if name in where}
        send(StoreFound(request.lookup_id, len(where), tiers))

    def _load(self, request: StoreLoad, send: Send, may_write: bool) -> None:
        fault = self._fault(request.hashes, request.local_block_ids, self._loads, request.load_id)
        fault = fault or ("" if may_write else "only the process that registered the pool may load")
        if answer := store_refusal(request, fault) if fault else None:
            send(answer)
            return
        if not request.hashes:
            send(StoreLoadEnded(request.load_id, 0, [], "", "", 0, 0.0, {}))
            return
        targets = [self._pieces(block_id) for block_id in request.local_block_ids]
        opened = _OpenLoad(request, targets, self._executor.submit, send, self._load_ended)
        self._loads[request.load_id] = opened
        self._store.begin(opened, partial(self._fetch, opened))

    def _fetch(self, opened: _OpenLoad) -> None:
        """On a thread: have every block fetched, in order."""
        load = opened.load
        for index, key in enumerate(self._keys(opened.request.hashes)):
            if not load.wants(index):
                return
            wanted, take = partial(load.wants, index), partial(load.take, index)
            self._store.fetch(opened, key, self._layout.block_bytes, wanted, take)

    def _load_ended(self, opened: _OpenLoad) -> None:
        """It has stopped writing."""
        request = opened.request
        self._loads.pop(request.load_id, None)
        self._store.discard(opened)
        num_blocks, reason, tiers = opened.load.outcome()
        num_bytes = num_blocks * self._layout.block_bytes
        seconds = self._loop.time() - opened.started_at
        self._store.metrics.load_ended(reason or "ok", seconds)
        bad = request.local_block_ids[num_blocks:]
        opened.send(StoreLoadEnded(request.load_id, num_blocks, bad, reason, "", num_bytes, seconds, dict(tiers)))

    def _save(self, request: StoreSave, send: Send, may_write: bool) -> None:
        fault = self._fault(request.hashes, request.block_ids, self._saves, request.save_id)
        fault = fault or ("" if may_write else "only the process that registered the pool may save")
        if answer := store_refusal(request, fault) if fault else None:
            self._store.metrics.dropped("invalid", len(request.hashes))
            send(answer)
            return
        copies: dict[BlockKey, bytearray] = {}
        moves: list[Move] = []
        num_known, refused = 0, ""
        for key, block_id in zip(self._keys(request.hashes), request.block_ids, strict=True):
            if key in copies or self._store.is_saved(key):
                num_known += 1
            elif not self._store.reserve(self._layout.block_bytes):
                refused = "the slower tiers are too far behind"
                self._store.metrics.dropped("queue_full", len(request.hashes) - num_known - len(copies))
                break
            else:
                copies[key] = block = bytearray(self._layout.block_bytes)
                moves += gather(self._pieces(block_id), block)

        def end(completed: bool) -> None:
            self._saves.pop(request.save_id, None)
            for key, block in copies.items():
                if completed:
                    self._store.keep(key, block)
                else:
                    self._store.unreserve(len(block))
            self._store.metrics.save_ended()
            taken = len(copies) if completed else 0
            send(StoreSaveEnded(request.save_id, taken, num_known, refused if completed else "stopped"))

        if not moves:
            end(True)
            return

        def end_on_loop(completed: bool) -> None:
            self._loop.call_soon_threadsafe(end, completed)

        self._saves[request.save_id] = self._executor.submit(moves, end_on_loop)


class _OpenLoad:
    """A load with its deadline."""

    def __init__(
        self,
        request: StoreLoad,
        targets: Sequence[Sequence[Piece]],
        copy: Copy,
        send: Send,
        on_end: Callable[[_OpenLoad], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.request = request
        self.send = send
        self.started_at = loop.time()
        self.ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            self._timer.cancel()
            on_end(self)
            self.ended.set_result(None)

        def end_on_loop() -> None:
            with contextlib.suppress(RuntimeError):  # a read that hung came back after the loop's end
                loop.call_soon_threadsafe(end)

        self.load = Load(targets, copy, end_on_loop)
        self._timer = loop.call_later(request.deadline_s, self.load.close, "timeout")

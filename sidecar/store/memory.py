"""The fastest tier: blocks in this process's memory, least recently used first out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from sidecar.store.contract import TierObserver
from sidecar.store.keys import BlockKey


class MemoryTier:
    """See contract.Tier. A block that is evicted while somebody reads it lives until he lets go of it."""

    name = "memory"
    is_memory = True

    def __init__(self, max_bytes: int, observer: TierObserver) -> None:
        self._max_bytes = max_bytes
        self._observer = observer
        self._lock = threading.Lock()
        self._blocks: OrderedDict[BlockKey, bytearray] = OrderedDict()
        self._num_bytes = 0

    def has(self, keys: Sequence[BlockKey], *, until_missing: bool) -> list[bool]:
        with self._lock:
            return [key in self._blocks for key in keys]

    def get(self, key: BlockKey, num_bytes: int) -> bytearray | None:
        with self._lock:
            block = self._blocks.get(key)
            if block is None or len(block) != num_bytes:
                return None
            self._blocks.move_to_end(key)
            return block

    def put(self, key: BlockKey, block: bytearray) -> bool:
        if len(block) > self._max_bytes:
            return False
        num_evicted = 0
        with self._lock:
            if (before := self._blocks.pop(key, None)) is not None:
                self._num_bytes -= len(before)
            while self._num_bytes + len(block) > self._max_bytes:
                _, evicted = self._blocks.popitem(last=False)
                self._num_bytes -= len(evicted)
                num_evicted += 1
            self._blocks[key] = block
            self._num_bytes += len(block)
        if num_evicted:
            self._observer.evicted(self.name, num_evicted)
        return True

    def usage(self) -> tuple[int, int]:
        with self._lock:
            return len(self._blocks), self._num_bytes

    def fault(self) -> str:
        return ""

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._num_bytes = 0

"""The store of one sidecar: tiers, fastest first, with the threads that wait for the slow ones.

It outlives engines: what one saved the next one finds, also in memory. Blocks come in as buffers that nobody changes
any more; they are in memory at once and reach the slower tiers behind it, or are dropped where those can't keep up.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from sidecar.store.contract import Tier
from sidecar.store.io_threads import IoThreads
from sidecar.store.keys import BlockKey
from sidecar.store.metrics import StoreMetrics

MAX_KNOWN = 200_000
"""Keys remembered as written, so that they are not written again: some 30 MB."""
DRAIN_POLL_S = 0.02
WRITE_THREADS = 2
"""A tier; syncing one file while the next is written."""

Wanted = Callable[[], bool]
OnGot = Callable[[bytearray | None, str], None]
"""Called on any thread with the block and its tier, or with None and "" where no tier has it."""


class SlowTier:
    """A tier that may block: its own readers, so that it hangs alone, and its own writers."""

    def __init__(self, tier: Tier, num_readers: int) -> None:
        self.tier = tier
        self.readers = IoThreads(f"store-read-{tier.name}", num_readers)
        self.writers = IoThreads(f"store-write-{tier.name}", WRITE_THREADS)
        self._known: OrderedDict[BlockKey, None] = OrderedDict()
        self._lock = threading.Lock()

    def knows(self, key: BlockKey) -> bool:
        """Whether it had this block when it was last asked or told."""
        return key in self._known

    def learn(self, key: BlockKey, there: bool) -> None:
        with self._lock:
            if not there:
                self._known.pop(key, None)
                return
            self._known[key] = None
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def close(self) -> None:
        self.readers.close()
        self.writers.close()
        self.tier.close()


class BlockStore:
    """Thread-safe, but for `find` and `drain`, which are the event loop's; nothing here blocks."""

    def __init__(self, tiers: Sequence[Tier], metrics: StoreMetrics, *, num_threads: int, queue_bytes: int) -> None:
        self.names = tuple(tier.name for tier in tiers)
        self.metrics = metrics
        self.memory = next((tier for tier in tiers if tier.is_memory), None)
        self._quick = IoThreads("store", 2)
        """For what does not hang: going through the blocks of a load."""
        self._slow = [SlowTier(tier, num_threads) for tier in tiers if not tier.is_memory]
        self._tiers = tuple(tiers)
        self._queue_bytes = queue_bytes
        self._queued = 0
        self._lock = threading.Lock()

    def is_saved(self, key: BlockKey) -> bool:
        """Whether every tier has this block, as far as is known without asking."""
        return (self.memory is None or self.memory.has([key], until_missing=True)[0]) and all(
            slow.knows(key) for slow in self._slow
        )

    def begin(self, owner: object, work: Callable[[], None]) -> None:
        """Do this on a thread, but for the event loop's sake: it must not wait."""
        self._quick.submit(owner, work)

    def fetch(self, owner: object, key: BlockKey, num_bytes: int, wanted: Wanted, on_got: OnGot) -> None:
        """Get one block from the fastest tier that has it, while it is `wanted`; on any thread.

        `on_got` is called once, perhaps at once, unless the owner is discarded before.
        """
        if self.memory is not None:
            block = self.memory.get(key, num_bytes)
            self.metrics.read(self.memory.name, None if block is None else num_bytes, 0.0)
            if block is not None:
                on_got(block, self.memory.name)
                return
        self._fetch_from(0, owner, key, num_bytes, wanted, on_got)

    def discard(self, owner: object) -> None:
        """Begin nothing more of what this owner wanted fetched."""
        self._quick.discard(owner)
        for slow in self._slow:
            slow.readers.discard(owner)

    async def find(self, keys: Sequence[BlockKey], timeout_s: float) -> list[str]:
        """The fastest tier that has each of the leading blocks; a tier that does not answer in time has none."""
        deadline = time.monotonic() + timeout_s
        memory_has = self.memory.has(keys, until_missing=not self._slow) if self.memory else [False] * len(keys)
        where = [self.memory.name if there and self.memory else "" for there in memory_has]
        for slow in self._slow:
            missing = [index for index, name in enumerate(where) if not name]
            if not missing:
                break
            asked = [keys[index] for index in missing]
            found = await self._ask(slow, asked, slow is self._slow[-1], deadline - time.monotonic())
            for index, there in zip(missing, found, strict=True):
                where[index] = slow.tier.name if there else ""
        return where[: where.index("")] if "" in where else where

    def reserve(self, num_bytes: int) -> bool:
        """Room for a block on its way into the tiers; `keep` or `unreserve` follows."""
        with self._lock:
            if self._queued + num_bytes > self._queue_bytes:
                return False
            self._queued += num_bytes
            return True

    def unreserve(self, num_bytes: int) -> None:
        with self._lock:
            self._queued -= num_bytes

    def keep(self, key: BlockKey, block: bytearray) -> None:
        """Put a block whose room was reserved into memory now and into the slower tiers behind it."""
        if self.memory is not None and self.memory.put(key, block):
            self.metrics.written(self.memory.name, len(block), 0.0)
        if self._slow:
            self._write_behind(key, block)
        else:
            self.unreserve(len(block))

    async def drain(self, timeout_s: float) -> None:
        """Wait until what is on its way to slower tiers is there."""
        deadline = time.monotonic() + timeout_s
        while self._queued and time.monotonic() < deadline:  # noqa: ASYNC110  (threads tell nobody)
            await asyncio.sleep(DRAIN_POLL_S)

    def close(self) -> None:
        """End the threads and let go of the tiers."""
        self._quick.close()
        for slow in self._slow:
            slow.close()
        if self.memory is not None:
            self.memory.close()

    def faults(self) -> dict[str, str]:
        """By tier, why it takes or gives nothing now."""
        return {tier.name: fault for tier in self._tiers if (fault := tier.fault())}

    def measure(self) -> None:
        """Set the gauges."""
        faults = self.faults()
        for tier in self._tiers:
            num_blocks, num_bytes = tier.usage()
            self.metrics.blocks.labels(tier.name).set(num_blocks)
            self.metrics.used_bytes.labels(tier.name).set(num_bytes)
            self.metrics.up.labels(tier.name).set(tier.name not in faults)
        self.metrics.queued_bytes.set(self._queued)

    def _fetch_from(
        self, index: int, owner: object, key: BlockKey, num_bytes: int, wanted: Wanted, on_got: OnGot
    ) -> None:
        """From one slow tier, and where it has no such block from the next."""
        if index == len(self._slow):
            on_got(None, "")
            return
        slow = self._slow[index]

        def read() -> None:
            block = None
            if wanted():
                started_at = time.monotonic()
                block = slow.tier.get(key, num_bytes)
                self.metrics.read(slow.tier.name, None if block is None else num_bytes, time.monotonic() - started_at)
                slow.learn(key, block is not None)
                if block is not None and self.memory is not None:
                    self.memory.put(key, block)
            if block is None:
                self._fetch_from(index + 1, owner, key, num_bytes, wanted, on_got)
            else:
                on_got(block, slow.tier.name)

        slow.readers.submit(owner, read)

    async def _ask(self, slow: SlowTier, keys: list[BlockKey], is_last: bool, timeout_s: float) -> list[bool]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[bool]] = loop.create_future()

        def resolve(found: list[bool]) -> None:
            if not answer.done():
                answer.set_result(found)

        def ask() -> None:
            found = slow.tier.has(keys, until_missing=is_last)
            for key, there in zip(keys, found, strict=True):
                slow.learn(key, there)
                if is_last and not there:
                    break  # what follows was not looked for
            with contextlib.suppress(RuntimeError):  # a hung call came back after the loop's end
                loop.call_soon_threadsafe(resolve, found)

        slow.readers.submit(answer, ask)
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                return await answer
        except TimeoutError:
            slow.readers.discard(answer)
            self.metrics.error(slow.tier.name, "timeout")
            return [False] * len(keys)

    def _write_behind(self, key: BlockKey, block: bytearray) -> None:
        """To every slow tier, each at its own pace; the last one gives the room back."""
        waiting = [slow.tier.name for slow in self._slow]

        def write(slow: SlowTier) -> None:
            try:
                if not slow.knows(key):
                    self._write(slow, key, block)
            finally:
                with self._lock:
                    waiting.pop()
                    self._queued -= 0 if waiting else len(block)

        for slow in self._slow:
            slow.writers.submit(self, partial(write, slow))

    def _write(self, slow: SlowTier, key: BlockKey, block: bytearray) -> None:
        started_at = time.monotonic()
        there = slow.tier.put(key, block)
        slow.learn(key, there)
        if there:
            self.metrics.written(slow.tier.name, len(block), time.monotonic() - started_at)
        else:
            self.metrics.dropped(f"{slow.tier.name}_refused", 1)

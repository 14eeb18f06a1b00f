"""The store with tiers that hang, lag behind and disagree."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

import pytest
from prometheus_client import CollectorRegistry

from sidecar.store.block_store import BlockStore
from sidecar.store.keys import BlockKey
from sidecar.store.memory import MemoryTier
from sidecar.store.metrics import StoreMetrics
from tests.unit.sidecar.store.test_tiers import BLOCK_BYTES, block_of, key_of


class Shelf:
    """A slow tier whose calls wait while `gate` is closed."""

    is_memory = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = threading.Event()
        self.gate.set()
        self.blocks: dict[BlockKey, bytearray] = {}
        self.num_calls = 0
        self.takes = True

    def has(self, keys: Sequence[BlockKey], *, until_missing: bool) -> list[bool]:
        self._pass()
        return [key in self.blocks for key in keys]

    def get(self, key: BlockKey, num_bytes: int) -> bytearray | None:
        self._pass()
        return self.blocks.get(key)

    def put(self, key: BlockKey, block: bytearray) -> bool:
        self._pass()
        if self.takes:
            self.blocks[key] = block
        return self.takes

    def usage(self) -> tuple[int, int]:
        return len(self.blocks), 0

    def fault(self) -> str:
        return ""

    def close(self) -> None:
        self.gate.set()

    def _pass(self) -> None:
        self.num_calls += 1
        assert self.gate.wait(30)


class Case:
    """Memory of ten blocks, then two shelves."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        metrics = StoreMetrics(self.registry)
        self.memory = MemoryTier(10 * BLOCK_BYTES, metrics)
        self.near, self.far = Shelf("near"), Shelf("far")
        self.store = BlockStore(
            [self.memory, self.near, self.far], metrics, num_threads=2, queue_bytes=20 * BLOCK_BYTES
        )
        self.got: list[tuple[bytearray | None, str]] = []
        self.came = threading.Event()

    def keep(self, name: str) -> bool:
        if not self.store.reserve(BLOCK_BYTES):
            return False
        self.store.keep(key_of(name), block_of(name))
        return True

    def fetch(self, name: str) -> tuple[bytearray | None, str]:
        self.came.clear()
        self.store.fetch(object(), key_of(name), BLOCK_BYTES, lambda: True, self.take)
        assert self.came.wait(10)
        return self.got[-1]

    def take(self, block: bytearray | None, tier: str) -> None:
        self.got.append((block, tier))
        self.came.set()

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"baton_sidecar_store_{name}", labels) or 0.0


@pytest.fixture
async def case() -> AsyncIterator[Case]:
    case = Case()
    yield case
    case.store.close()


async def test_a_block_reaches_every_tier_and_is_got_from_the_fastest(case: Case) -> None:
    assert case.keep("a")
    await case.store.drain(5)
    assert case.near.blocks.keys() == case.far.blocks.keys() == {key_of("a")}
    assert case.store.is_saved(key_of("a"))
    assert case.fetch("a") == (block_of("a"), "memory")
    assert case.sample("written_blocks_total", tier="far") == 1


async def test_a_block_of_a_slow_tier_comes_to_memory(case: Case) -> None:
    case.far.blocks[key_of("a")] = block_of("a")
    assert case.fetch("a") == (block_of("a"), "far")
    assert case.fetch("a") == (block_of("a"), "memory")
    assert case.fetch("b") == (None, "")
    assert case.sample("misses_total", tier="near") == 2


async def test_found_is_what_any_tier_has_up_to_the_first_gap(case: Case) -> None:
    names = [str(index) for index in range(6)]
    case.memory.put(key_of("0"), block_of("0"))
    case.near.blocks[key_of("1")] = case.near.blocks[key_of("4")] = bytearray()
    case.far.blocks[key_of("2")] = bytearray()
    case.memory.put(key_of("5"), block_of("5"))
    keys = [key_of(name) for name in names]
    assert await case.store.find(keys, 5.0) == ["memory", "near", "far"]
    assert await case.store.find([], 5.0) == []


async def test_a_tier_that_hangs_hangs_alone(case: Case) -> None:
    case.keep("kept")
    await case.store.drain(5)
    case.far.blocks[key_of("far")] = block_of("far")
    case.near.gate.clear()
    started_at = time.monotonic()
    assert await case.store.find([key_of("kept"), key_of("far")], 0.2) == ["memory"]
    assert await case.store.find([key_of("kept")], 0.2) == ["memory"]
    assert case.fetch("kept") == (block_of("kept"), "memory")
    assert time.monotonic() - started_at < 10
    case.keep("new")
    for _ in range(500):
        if key_of("new") in case.far.blocks:
            break
        await asyncio.sleep(0.01)
    assert key_of("new") in case.far.blocks and key_of("new") not in case.near.blocks
    case.near.gate.set()
    await case.store.drain(5)
    assert key_of("new") in case.near.blocks


async def test_what_a_slow_tier_cannot_keep_up_with_is_refused(case: Case) -> None:
    case.far.gate.clear()
    assert [case.keep(str(index)) for index in range(25)] == [True] * 20 + [False] * 5
    case.far.gate.set()
    await case.store.drain(5)
    assert case.keep("later")
    await case.store.drain(5)
    assert len(case.far.blocks) == 21


async def test_what_a_tier_refuses_is_offered_again(case: Case) -> None:
    case.near.takes = False
    case.keep("a")
    await case.store.drain(5)
    assert not case.store.is_saved(key_of("a"))
    assert case.sample("dropped_blocks_total", reason="near_refused") == 1
    case.near.takes = True
    case.keep("a")
    await case.store.drain(5)
    assert case.store.is_saved(key_of("a"))


async def test_what_others_have_evicted_is_written_again(case: Case) -> None:
    case.keep("a")
    await case.store.drain(5)
    case.memory.close()
    del case.far.blocks[key_of("a")], case.near.blocks[key_of("a")]
    assert await case.store.find([key_of("a")], 5.0) == []
    assert not case.store.is_saved(key_of("a"))
    case.keep("a")
    await case.store.drain(5)
    assert key_of("a") in case.near.blocks and key_of("a") in case.far.blocks


async def test_a_discarded_owner_waits_for_nothing(case: Case) -> None:
    owner = object()
    case.near.gate.clear()
    for index in range(50):
        case.store.fetch(owner, key_of(str(index)), BLOCK_BYTES, lambda: True, case.take)
    case.store.discard(owner)
    case.near.gate.set()
    assert case.fetch("other") == (None, "")
    assert case.near.num_calls <= 2 + 1, "what had not begun never did"


async def test_what_nobody_wants_is_not_read(case: Case) -> None:
    case.near.blocks[key_of("a")] = block_of("a")
    case.store.fetch(object(), key_of("a"), BLOCK_BYTES, lambda: False, case.take)
    assert case.came.wait(5)
    assert case.got == [(None, "")]
    assert case.near.num_calls == 0


async def test_closing_does_not_wait_for_a_call_that_hangs() -> None:
    case = Case()
    case.near.gate.clear()
    case.near.close = lambda: None  # type: ignore[method-assign]
    case.store.fetch(object(), key_of("a"), BLOCK_BYTES, lambda: True, case.take)
    started_at = time.monotonic()
    case.store.close()
    assert time.monotonic() - started_at < 15
    case.near.gate.set()

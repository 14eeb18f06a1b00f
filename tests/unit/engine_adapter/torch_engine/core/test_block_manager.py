from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine_adapter.torch_engine.block_manager import BlockManager

NUM_BLOCKS = 8


class Blocks(RuleBasedStateMachine):
    """Random sequences over a small pool: found prefixes, allocations, registrations and releases in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, 2)
        self.held: list[tuple[list[int], list[bytes]]] = []

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=2, max_size=10), registers=st.booleans())
    def admit(self, token_ids: list[int], registers: bool) -> None:
        num_full = len(token_ids) // 2
        hashes = self.blocks.hash_full_blocks(token_ids, num_full)
        cached = self.blocks.acquire_cached_prefix(hashes)
        fresh = self.blocks.allocate(num_full - len(cached))
        if fresh is None:
            self.blocks.release(cached)
            return
        assert not set(fresh) & {block_id for block_ids, _ in self.held for block_id in block_ids}
        if registers:
            for block_id, block_hash in zip(cached + fresh, hashes, strict=True):
                self.blocks.register(block_id, block_hash)
        self.held.append((cached + fresh, hashes))

    @rule(index=st.integers(0, 7))
    def release(self, index: int) -> None:
        if index < len(self.held):
            block_ids, _ = self.held.pop(index)
            self.blocks.release(block_ids)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        self.blocks.check_conservation()
        held = {block_id for block_ids, _ in self.held for block_id in block_ids}
        assert self.blocks.num_free_blocks == NUM_BLOCKS - len(held)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_equal_prefixes_share_blocks_and_stop_at_the_first_difference() -> None:
    blocks = BlockManager(8, 2)
    first = blocks.allocate(3)
    assert first == [0, 1, 2]
    for block_id, block_hash in zip(first, blocks.hash_full_blocks([1, 2, 3, 4, 5, 6], 3), strict=True):
        blocks.register(block_id, block_hash)
    assert blocks.acquire_cached_prefix(blocks.hash_full_blocks([1, 2, 3, 4, 9, 6], 3)) == [0, 1]
    assert blocks.acquire_cached_prefix(blocks.hash_full_blocks([9, 2, 3, 4, 5, 6], 3)) == []


def test_a_block_is_only_equal_after_the_same_parents() -> None:
    blocks = BlockManager(8, 2)
    assert blocks.hash_full_blocks([1, 2, 3, 4], 2)[1] != blocks.hash_full_blocks([5, 6, 3, 4], 2)[1]


def test_another_salt_or_block_size_is_another_hash() -> None:
    hashes = {BlockManager(1, size, salt=salt).hash_full_blocks([1, 2], 1)[0] for size in (1, 2) for salt in "ab"}
    assert len(hashes) == 4


def test_known_hashes_are_continued() -> None:
    blocks = BlockManager(1, 2)
    whole = blocks.hash_full_blocks(range(8), 4)
    assert blocks.hash_full_blocks(range(8), 4, whole[:2]) == whole
    assert blocks.hash_full_blocks(range(8), 1, whole) == whole[:1]


def test_least_recently_used_content_goes_first_and_a_prefix_outlives_its_end() -> None:
    blocks = BlockManager(4, 1)
    old, new = blocks.allocate(2), blocks.allocate(2)
    assert old is not None and new is not None
    for block_id, block_hash in zip(old, blocks.hash_full_blocks([1, 2], 2), strict=True):
        blocks.register(block_id, block_hash)
    for block_id, block_hash in zip(new, blocks.hash_full_blocks([3, 4], 2), strict=True):
        blocks.register(block_id, block_hash)
    blocks.release(old)
    blocks.release(new)
    assert blocks.allocate(1) == [old[1]]
    assert blocks.acquire_cached_prefix(blocks.hash_full_blocks([1, 2], 2)) == [old[0]]


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    blocks = BlockManager(3, 1)
    assert blocks.allocate(4) is None
    assert blocks.num_free_blocks == 3
    assert blocks.allocate(3) == [0, 1, 2]
    assert blocks.allocate(1) is None
    assert blocks.allocate(0) == []


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(2, 1, enable_prefix_caching=False)
    block_ids = blocks.allocate(1)
    hashes = blocks.hash_full_blocks([1], 1)
    assert block_ids is not None
    blocks.register(block_ids[0], hashes[0])
    assert blocks.acquire_cached_prefix(hashes) == []


def test_faults_of_the_caller_are_named() -> None:
    blocks = BlockManager(2, 1)
    with pytest.raises(AssertionError, match="released more often"):
        blocks.release([0])
    with pytest.raises(AssertionError, match="not held"):
        blocks.register(0, b"hash")

"""Who holds which block of the KV pool. Pure.

Every block is in exactly one of three places: free, cached-free (no holder, but its content is known by hash and may be
found again), or held (one or more holders). `check_conservation` says so, and a property test calls it.

A block's hash covers its own tokens, its parent's hash and a salt for all that gives the bytes their meaning, as in
vLLM's prefix caching: equal hashes mean equal KV.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence


class BlockManager:
    """Reference counts, the prefix cache, and least-recently-used reuse of cached-free blocks."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, salt: str = "") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._root = hashlib.sha256(f"{salt}|{block_size}".encode()).digest()
        self._free: deque[int] = deque(range(num_blocks))
        self._cached_free: OrderedDict[int, bytes] = OrderedDict()
        """Block id to hash, least recently used first."""
        self._num_holders = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Free or cached-free: what `allocate` could hand out."""
        return len(self._free) + len(self._cached_free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def hash_full_blocks(
        self,
        token_ids: Sequence[int],
        num_blocks: int,
        known: Sequence[bytes] = (),
        key_of: Callable[[int, int], bytes] | None = None,
    ) -> list[bytes]:
        """Chained hashes of the first `num_blocks` blocks of a sequence; `known` is a prefix of the answer.

        `key_of(start, end)`: what makes the content of these places beside their token ids, such as an image's hash.
        """
        hashes = list(known[:num_blocks])
        parent = hashes[-1] if hashes else self._root
        for start in range(len(hashes) * self.block_size, num_blocks * self.block_size, self.block_size):
            tokens = array("q", token_ids[start : start + self.block_size])
            key = key_of(start, start + self.block_size) if key_of is not None else b""
            parent = hashlib.sha256(parent + tokens.tobytes() + key).digest()
            hashes.append(parent)
        return hashes

    def acquire_cached_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Hold the longest run of cached blocks from the start of `hashes`; give them back with `release`."""
        if not self.enable_prefix_caching:
            return []
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            if self._num_holders[block_id] == 0:
                del self._cached_free[block_id]
            self._num_holders[block_id] += 1
            block_ids.append(block_id)
        return block_ids

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hold that many blocks of unknown content, or None (and nothing changed) where the pool can't give them."""
        if num_blocks > self.num_free_blocks:
            return None
        block_ids = []
        for _ in range(num_blocks):
            if self._free:
                block_id = self._free.popleft()
            else:
                block_id, block_hash = self._cached_free.popitem(last=False)
                del self._block_of[block_hash]
                del self._hash_of[block_id]
            self._num_holders[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def hold(self, block_ids: Iterable[int]) -> None:
        """One holder more for each, of blocks that are held already."""
        for block_id in block_ids:
            if self._num_holders[block_id] <= 0:
                raise AssertionError(f"block {block_id} is not held")
            self._num_holders[block_id] += 1

    def register(self, block_id: int, block_hash: bytes) -> None:
        """The content of a held block is complete and has this hash. The first block of a hash keeps it."""
        if not self.enable_prefix_caching or block_hash in self._block_of or block_id in self._hash_of:
            return
        if self._num_holders[block_id] == 0:
            raise AssertionError(f"block {block_id} is registered but not held")
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less for each. The last block of a sequence is reused first: a prefix is worth more."""
        for block_id in reversed(block_ids):
            if self._num_holders[block_id] <= 0:
                raise AssertionError(f"block {block_id} is released more often than held")
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id]:
                continue
            block_hash = self._hash_of.get(block_id)
            if block_hash is None:
                self._free.append(block_id)
            else:
                self._cached_free[block_id] = block_hash

    def check_conservation(self) -> None:
        """Raises AssertionError unless every block is in exactly one place and the hash maps mirror each other."""
        held = {block_id for block_id, num_holders in enumerate(self._num_holders) if num_holders > 0}
        places = [*self._free, *self._cached_free, *held]
        assert sorted(places) == list(range(self.num_blocks)), "a block is lost or in two places"
        assert min(self._num_holders) >= 0
        assert self._block_of == {block_hash: block_id for block_id, block_hash in self._hash_of.items()}
        assert all(self._hash_of[block_id] == block_hash for block_id, block_hash in self._cached_free.items())
        assert not any(block_id in self._hash_of for block_id in self._free)

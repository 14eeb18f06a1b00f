"""What a request's blocks are called in the prefix store: hashes of everything their KV was computed from. Pure.

vLLM's own block hashes are not used: where they begin depends on its version, on --prefix-caching-hash-algo and for
some of those on PYTHONHASHSEED, they are pickled, and two engines that differ in any of it would never share a block.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FORMAT = "baton-vllm-1"


@dataclass(frozen=True, slots=True)
class Item:
    """An image, a sound: what stands for `length` tokens from `offset` on, by a hash of its content."""

    name: str
    offset: int
    length: int


@dataclass(slots=True)
class Chain:
    """The hashes of one request's blocks, made as far as they are asked for."""

    root: bytes
    block_size: int
    items: Sequence[Item] = ()
    hashes: list[bytes] = field(default_factory=list)

    def upto(self, tokens: Sequence[int], num_blocks: int) -> list[bytes]:
        """Of the first `num_blocks` blocks; of fewer where a token is not known. `tokens` may have grown."""
        for index in range(len(self.hashes), num_blocks):
            begin, end = index * self.block_size, (index + 1) * self.block_size
            block = tokens[begin:end]
            if len(block) < self.block_size or min(block) < 0:  # what vLLM puts where a token is still to come
                break
            digest = hashlib.sha256(self.hashes[-1] if self.hashes else self.root)
            digest.update(struct.pack(f"<{self.block_size}Q", *block))
            within = [
                [item.name, item.offset - begin, item.length]
                for item in self.items
                if item.offset < end and item.offset + item.length > begin
            ]
            digest.update(json.dumps(within).encode())
            self.hashes.append(digest.digest())
        return self.hashes[:num_blocks]


def root_of(computation: str, block_size: int, cache_salt: str | None, lora: Sequence[str], generation: str) -> bytes:
    """Where a chain begins: everything that holds for every block of a request."""
    parts = [FORMAT, computation, block_size, cache_salt, list(lora), generation]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def items_of(request: Any) -> list[Item] | None:
    """A request's images and the like; None where its tokens don't say all that its KV is computed from."""
    if getattr(request, "prompt_embeds", None) is not None or getattr(request, "pooling_params", None) is not None:
        return None
    features = getattr(request, "mm_features", None)
    if features is None:
        return None
    items = []
    for feature in features:
        if not isinstance(feature.identifier, str) or not feature.identifier:
            return None
        name = json.dumps([feature.modality, feature.identifier, getattr(feature, "mm_hash", None)])
        items.append(Item(name, int(feature.mm_position.offset), int(feature.mm_position.length)))
    return items

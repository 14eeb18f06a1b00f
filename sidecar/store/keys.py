"""The name of a block in the store: what gives its bytes their meaning, and the hash of what they were computed from.

Pure, and the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import msgspec

from sidecar.layout import KvLayout

STORE_FORMAT = 1
"""Of keys and sealed blocks together; another one never meets these blocks."""
_POOL_FIELDS = frozenset({"num_blocks", "planes"})
"""Where blocks lie in a pool says nothing of what is in them."""


class BlockKey(NamedTuple):
    namespace: bytes
    block_hash: bytes

    def __str__(self) -> str:
        return f"{self.namespace.hex()}/{self.block_hash.hex()}"


def namespace_of(layout: KvLayout, rank: int) -> bytes:
    """16 bytes that differ where two pools' blocks differ in meaning.

    Every field of the layout counts but the pool's geometry, also those that a later version adds.
    """
    fields = msgspec.to_builtins(layout)
    meaning = {name: value for name, value in fields.items() if name not in _POOL_FIELDS}
    meaning["plane_block_bytes"] = [plane.block_bytes for plane in layout.planes]
    meaning["rank"] = rank
    meaning["store_format"] = STORE_FORMAT
    canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=16).digest()

"""What a block is: where its bytes lie in a pool, and what gives those bytes their meaning."""

from __future__ import annotations

import msgspec

MAX_POOL_BYTES = 1 << 46
"""64 TiB; beyond any machine's memory, so that sums of offsets stay far from 2**63."""


class Plane(msgspec.Struct, frozen=True):
    """One piece of every block: block b lies at [offset + b * stride_bytes, + block_bytes) of the pool."""

    offset: int
    stride_bytes: int
    block_bytes: int


class KvLayout(msgspec.Struct, frozen=True):
    """A pool of KV blocks. `block_size` counts tokens; `model` is a fingerprint; `order` names the axes of a block."""

    num_blocks: int
    block_size: int
    planes: tuple[Plane, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    model: str
    order: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all planes."""
        return sum(plane.block_bytes for plane in self.planes)

    @property
    def pool_bytes(self) -> int:
        """The end of the last block of the plane that reaches farthest."""
        return max(
            plane.offset + (self.num_blocks - 1) * plane.stride_bytes + plane.block_bytes for plane in self.planes
        )

    def summary(self) -> str:
        """For a log line: planes may be many, and are alike."""
        return (
            f"{self.num_blocks}x{self.block_bytes}B/{len(self.planes)}planes block_size={self.block_size} "
            f"layers={self.num_layers} kv_heads={self.num_kv_heads} head_dim={self.head_dim} dtype={self.dtype}"
        )

    def meaning(self) -> dict[str, object]:
        """The fields two pools must share so that one's bytes make sense in the other."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "order": self.order,
            "plane_block_bytes": tuple(plane.block_bytes for plane in self.planes),
        }


def layout_fault(layout: KvLayout) -> str:
    """Why `layout` describes no pool, naming the field; "" if it does."""
    for name in ("num_blocks", "block_size", "num_layers", "num_kv_heads", "head_dim"):
        if getattr(layout, name) < 1:
            return f"{name} is {getattr(layout, name)}, it must be at least 1"
    if not layout.planes:
        return "planes is empty"
    for index, plane in enumerate(layout.planes):
        if plane.offset < 0 or plane.block_bytes < 1 or plane.stride_bytes < plane.block_bytes:
            return (
                f"planes[{index}] has offset {plane.offset}, stride_bytes {plane.stride_bytes} and "
                f"block_bytes {plane.block_bytes}: blocks would overlap or lie outside the pool"
            )
    if layout.pool_bytes > MAX_POOL_BYTES:
        return f"the pool would end at byte {layout.pool_bytes}, the limit is {MAX_POOL_BYTES}"
    return ""


def mismatch(producer: KvLayout, consumer: KvLayout) -> str:
    """The first field in which two pools' bytes differ in meaning, with both values; "" if none does."""
    theirs = consumer.meaning()
    for name, value in producer.meaning().items():
        if value != theirs[name]:
            return f"{name} differs: the producer has {value!r}, the consumer has {theirs[name]!r}"
    return ""

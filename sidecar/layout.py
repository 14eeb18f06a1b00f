"""What a block is: where its bytes lie in a pool, which part of the model they hold, and what they mean."""

from __future__ import annotations

import math

import msgspec

MAX_POOL_BYTES = 1 << 46
"""64 TiB; beyond any machine's memory, so that sums of offsets stay far from 2**63."""

MAX_RANKS = 4096
"""Tensor-parallel ranks, and pipeline stages; far beyond any machine's."""


class Plane(msgspec.Struct, frozen=True):
    """One piece of every block: block b lies at [offset + b * stride_bytes, + block_bytes) of the pool."""

    offset: int
    stride_bytes: int
    block_bytes: int


class KvLayout(msgspec.Struct, frozen=True):
    """One rank's pool of KV blocks. `block_size` counts tokens; `model` is a fingerprint of the whole model.

    `num_layers` and `num_kv_heads` are this rank's. `axes` names what a block of a plane is made of, outermost first;
    the innermost cells follow, whose bytes only `order` describes. Without axes a block is copied whole or not at all.
    Without a "layer" axis every layer has as many planes as the others, in the model's order.
    """

    num_blocks: int
    block_size: int
    planes: tuple[Plane, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    model: str
    order: str
    axes: tuple[str, ...] = ()
    """Of "layer", "kv", "token", "head", and "part:N" for N equal pieces that mean nothing else."""
    tp_rank: int = 0
    tp_size: int = 1
    total_kv_heads: int = 0
    """Of the model, 1 for MLA's latent; 0 stands for `num_kv_heads`. More ranks than heads: neighbours share one."""
    pp_rank: int = 0
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage; empty: one stage."""

    @property
    def model_heads(self) -> int:
        """KV heads of the whole model."""
        return self.total_kv_heads or self.num_kv_heads

    @property
    def heads(self) -> range:
        """The KV heads that this rank holds."""
        return rank_heads(self.tp_rank, self.tp_size, self.model_heads)

    @property
    def layers(self) -> range:
        """The layers that this rank holds."""
        first = sum(self.stage_layers[: self.pp_rank])
        return range(first, first + self.num_layers)

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """How many there are along each of `axes`; 0 for an axis that nobody knows."""
        sizes = {"layer": self.num_layers, "kv": 2, "token": self.block_size, "head": self.num_kv_heads}
        return tuple(sizes.get(axis) or _part_size(axis) for axis in self.axes)

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
        """The fields two pools must share so that one's bytes make sense in the other, however they are cut up."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "num_layers": sum(self.stage_layers) or self.num_layers,
            "num_kv_heads": self.model_heads,
            "head_dim": self.head_dim,
            "order": self.order,
            "axes": tuple(sorted(self.axes)),
            **({} if "token" in self.axes else {"block_size": self.block_size}),
        }


def rank_heads(tp_rank: int, tp_size: int, model_heads: int) -> range:
    """The KV heads of one tensor-parallel rank, as vLLM deals them out."""
    if tp_size > model_heads:
        head = tp_rank * model_heads // tp_size
        return range(head, head + 1)
    each = model_heads // tp_size
    return range(tp_rank * each, (tp_rank + 1) * each)


def same_shape(producer: KvLayout, consumer: KvLayout) -> bool:
    """Whether blocks are copied whole: both ranks hold the same heads and layers of as many tokens, in one order."""
    return (
        producer.axes == consumer.axes
        and producer.block_size == consumer.block_size
        and producer.heads == consumer.heads
        and producer.layers == consumer.layers
    )


def layout_fault(layout: KvLayout) -> str:
    """Why `layout` describes no pool, naming the field; "" if it does."""
    for name in ("num_blocks", "block_size", "num_layers", "num_kv_heads", "head_dim", "tp_size"):
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
    return _parallel_fault(layout) or _axes_fault(layout)


def _parallel_fault(layout: KvLayout) -> str:
    """Whether the rank and what it holds belong together."""
    size, heads, stages = layout.tp_size, layout.model_heads, layout.stage_layers
    if not 0 <= layout.tp_rank < size or size > MAX_RANKS:
        return f"tp_rank is {layout.tp_rank} of tp_size {size}"
    if layout.total_kv_heads < (size > 1):
        return f"total_kv_heads is {layout.total_kv_heads}, with tp_size {size} it must be at least {int(size > 1)}"
    if heads % size and size % heads:
        return f"total_kv_heads {heads} and tp_size {size}: neither divides the other"
    if len(layout.heads) != layout.num_kv_heads:
        return f"num_kv_heads is {layout.num_kv_heads}, of {heads} over {size} ranks it must be {len(layout.heads)}"
    if not stages:
        return f"pp_rank is {layout.pp_rank} without stage_layers" if layout.pp_rank else ""
    if min(stages) < 1 or len(stages) > MAX_RANKS or not 0 <= layout.pp_rank < len(stages):
        return f"pp_rank is {layout.pp_rank} of stage_layers {stages}"
    if stages[layout.pp_rank] != layout.num_layers:
        return f"num_layers is {layout.num_layers}, stage_layers says {stages[layout.pp_rank]}"
    return ""


def _axes_fault(layout: KvLayout) -> str:
    """Whether every plane is made of what the axes say."""
    axes, sizes = layout.axes, layout.axis_sizes
    if not axes:
        return ""
    if len(set(axes)) != len(axes) or min(sizes) < 1:
        return f"axes is {axes}; give each of layer, kv, token, head and part:N once at most"
    if "head" not in axes and layout.num_kv_heads > 1:
        return f"axes {axes} has no head, and the rank holds {layout.num_kv_heads}"
    cells = math.prod(sizes)
    for index, plane in enumerate(layout.planes):
        if plane.block_bytes % cells:
            return f"planes[{index}] has {plane.block_bytes} bytes a block, not a multiple of the {cells} cells of axes"
    if "layer" not in axes and layout.stage_layers and len(layout.planes) % layout.num_layers:
        return f"planes has {len(layout.planes)}, not as many for each of {layout.num_layers} layers"
    return ""


def mismatch(producer: KvLayout, consumer: KvLayout) -> str:
    """The first field in which two pools' bytes differ in meaning, with both values; "" if none does."""
    theirs = consumer.meaning()
    for name, value in producer.meaning().items():
        if value != theirs[name]:
            return _differs(name, value, theirs[name])
    if same_shape(producer, consumer):
        blocks = [tuple(plane.block_bytes for plane in layout.planes) for layout in (producer, consumer)]
        return _differs("plane_block_bytes", *blocks) if blocks[0] != blocks[1] else ""
    return _cut_fault(producer, consumer)


def push_fault(producer: KvLayout, consumer: KvLayout) -> str:
    """Why KV can't be pushed between these two, though it might be pulled: a landing is one rank's, for one rank."""
    for layout in (producer, consumer):
        if (num_ranks := layout.tp_size * max(1, len(layout.stage_layers))) > 1:
            side = "producer" if layout is producer else "consumer"
            return f"the {side} has {num_ranks} ranks: layerwise pushes need engines of one rank each, pulls do not"
    if producer.block_size != consumer.block_size:
        return _differs("block_size", producer.block_size, consumer.block_size) + ": layerwise pushes need one"
    return ""


def _cut_fault(producer: KvLayout, consumer: KvLayout) -> str:
    """Why the blocks of one can't be put together from pieces of the other's."""
    for name in ("heads", "layers"):
        held, wanted = getattr(producer, name), getattr(consumer, name)
        nothing = max(held.start, wanted.start) >= min(held.stop, wanted.stop)
        if nothing or (held != wanted and not producer.axes):
            return _differs(name, f"{held.start} to {held.stop}", f"{wanted.start} to {wanted.stop}")
    if max(producer.block_size, consumer.block_size) % min(producer.block_size, consumer.block_size):
        return _differs("block_size", producer.block_size, consumer.block_size) + ": neither divides the other"
    by_layer = "layer" not in producer.axes and producer.layers != consumer.layers
    cells = [_cell_bytes(layout, by_layer=by_layer) for layout in (producer, consumer)]
    if cells[0] is None or cells[0] != cells[1]:
        return _differs("cell_bytes", *cells)
    return ""


def _cell_bytes(layout: KvLayout, *, by_layer: bool) -> tuple[int, ...] | None:
    """Of each plane, or of the planes of a layer where all layers are alike; None if they are not."""
    num_cells = math.prod(layout.axis_sizes)
    cells = tuple(plane.block_bytes // num_cells for plane in layout.planes)
    if not by_layer:
        return cells
    each, left = divmod(len(cells), layout.num_layers)
    return cells[:each] if not left and cells == cells[:each] * layout.num_layers else None


def _differs(name: str, theirs: object, ours: object) -> str:
    return f"{name} differs: the producer has {theirs!r}, the consumer has {ours!r}"


def _part_size(axis: str) -> int:
    name, _, number = axis.partition(":")
    return int(number) if name == "part" and number.isascii() and number.isdigit() and len(number) < 10 else 0

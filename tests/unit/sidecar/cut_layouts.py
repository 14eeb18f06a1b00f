"""Layouts of the ranks of one model, and what belongs where in their pools, by a gather that knows no spans."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sidecar.layout import KvLayout, Plane

CELLS = 3
"""Numbers in a cell, where nothing else is said; `head_dim` has it."""
TOKEN_MAJOR = ("kv", "token", "head")
HEAD_MAJOR = ("head", "kv", "token")
WHOLE_POOL = ("layer", "kv", "token", "head")
MIXED = ("token", "layer", "head", "kv")
NUM_TOKENS = 8
MOST_TOKENS = 4096
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@lru_cache(maxsize=100_000)
def rank_layout(
    axes: tuple[str, ...],
    block_size: int,
    heads: int,
    tp: int,
    rank: int,
    stages: tuple[int, ...] = (1,),
    num_blocks: int = 0,
    cells: int = CELLS,
) -> KvLayout:
    """One rank's pool with a gap between blocks; without a layer axis a plane a layer."""
    pp_rank, tp_rank = divmod(rank, tp)
    layers, mine = stages[pp_rank], max(1, heads // tp)
    sizes = {"layer": layers, "kv": 2, "token": block_size, "head": mine}
    block = cells * int(np.prod([sizes[axis] for axis in axes]))
    blocks = num_blocks or NUM_TOKENS // block_size + 2
    stride = block if rank % 2 else block + 2
    count = 1 if "layer" in axes else layers
    planes = tuple(Plane(index * blocks * stride, stride, block) for index in range(count))
    return KvLayout(
        blocks, block_size, planes, layers, mine, cells, "float32", "m", "plain", axes, tp_rank, tp, heads,
        pp_rank, stages,
    )  # fmt: skip


def content(layout: KvLayout, block_ids: list[int]) -> tuple[Numbers, Numbers]:
    """Where in the pool the tokens' cells lie, and what belongs there, each in the order layer, kv, token, head."""
    cells = layout.head_dim
    shape = (layout.num_layers, 2, len(block_ids) * layout.block_size, layout.num_kv_heads, cells)
    where = np.zeros(shape, np.int64)
    step = layout.planes[0].block_bytes
    index = dict(zip(("layer", "kv", "token", "head"), np.indices(shape[:4], sparse=True), strict=True))
    blocks = np.array(block_ids)[index["token"] // layout.block_size]
    for axis, size in zip(layout.axes, layout.axis_sizes, strict=True):
        step //= size
        where += ((index[axis] % layout.block_size if axis == "token" else index[axis]) * step)[..., None]
    where += (blocks * layout.planes[0].stride_bytes)[..., None] + np.arange(cells)
    if "layer" not in layout.axes:
        where += np.array([plane.offset for plane in layout.planes])[index["layer"]][..., None]
    heads, layers = index["head"] + layout.heads.start, index["layer"] + layout.layers.start
    means = (((layers * 2 + index["kv"]) * MOST_TOKENS + index["token"]) * 16 + heads)[..., None] * cells
    return where, 1 + means + np.arange(cells)

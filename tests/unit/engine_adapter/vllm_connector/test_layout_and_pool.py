"""KV tensors of every engine's shape, moved into shared memory: each block's bytes are where the planes say."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from engine_adapter.vllm_connector.layout import KvTensors, axes_of, order_of, planes_of, tensors_of
from engine_adapter.vllm_connector.pool import SharedPool, share
from engine_adapter.vllm_connector.settings import ConnectorStartError
from sidecar.protocol import Plane

BLOCKS, BLOCK, HEADS, DIM = 6, 16, 2, 8
LAYERS = ("layers.0", "layers.1")


def one_storage() -> dict[str, KvTensors]:
    """vLLM 0.32: every layer a view of one buffer, [block, head, token, 2 * dim]."""
    block = HEADS * BLOCK * 2 * DIM
    buffer = torch.arange(len(LAYERS) * BLOCKS * block, dtype=torch.float32)
    views = buffer.view(len(LAYERS), BLOCKS, HEADS, BLOCK, 2 * DIM)
    return {layer: views[index] for index, layer in enumerate(LAYERS)}


def halves() -> dict[str, KvTensors]:
    """vLLM 0.13 and 0.18: one tensor a layer, keys then values."""
    return {layer: torch.randn(2, BLOCKS, HEADS, BLOCK, DIM) for layer in LAYERS}


def ascend() -> dict[str, KvTensors]:
    """vllm-ascend, GQA: a pair of token-major tensors."""
    return {layer: tuple(torch.randn(BLOCKS, BLOCK, HEADS, DIM) for _ in "KV") for layer in LAYERS}


def ascend_mla() -> dict[str, KvTensors]:
    """vllm-ascend, MLA: latent and rotary part, of different widths."""
    return {layer: (torch.randn(BLOCKS, BLOCK, 1, 32), torch.randn(BLOCKS, BLOCK, 1, 4)) for layer in LAYERS}


def split_blocks() -> dict[str, KvTensors]:
    """A kernel with blocks of half the size."""
    return {layer: torch.randn(2 * BLOCKS, HEADS, BLOCK // 2, 2 * DIM) for layer in LAYERS}


def shared_between_layers() -> dict[str, KvTensors]:
    tensor = torch.randn(BLOCKS, HEADS, BLOCK, 2 * DIM)
    return {"layers.0": tensor, "layers.1": tensor}


def shared_among_others() -> dict[str, KvTensors]:
    """Layers that take another one's KV, in the middle of its storage."""
    tensor = torch.randn(2 * BLOCKS, HEADS, BLOCK, 2 * DIM)[BLOCKS:]
    return {"layers.0": torch.randn(BLOCKS, HEADS, BLOCK, 2 * DIM), "layers.1": tensor, "layers.2": tensor}


def block_first() -> dict[str, KvTensors]:
    """One buffer in which a block holds all layers."""
    views = torch.randn(BLOCKS, len(LAYERS), HEADS, BLOCK, 2 * DIM)
    return {layer: views[:, index] for index, layer in enumerate(LAYERS)}


def bytes_of_block(kv_caches: dict[str, KvTensors], block: int) -> list[bytes]:
    """Each piece of a block, read the way a kernel does."""
    pieces = []
    for _, tensor in tensors_of(kv_caches):
        halves = [tensor[0], tensor[1]] if tensor.shape[0] == 2 else [tensor]
        for half in halves:
            rows = half.shape[0] // BLOCKS
            pieces.append(half[block * rows : (block + 1) * rows].contiguous().numpy().tobytes())
    return pieces


def read(pool: SharedPool, plane: Plane, block: int) -> bytes:
    return os.pread(pool.fd, plane.block_bytes, plane.offset + block * plane.stride_bytes)


@pytest.mark.parametrize(
    "make",
    [one_storage, halves, ascend, ascend_mla, split_blocks, shared_between_layers, shared_among_others, block_first],
)
def test_blocks_keep_their_bytes_and_lie_where_the_planes_say(make: object) -> None:
    assert callable(make)
    kv_caches: dict[str, KvTensors] = make()
    before = [bytes_of_block(kv_caches, block) for block in range(BLOCKS)]
    tensors = tensors_of(kv_caches)
    held = [tensor for _, tensor in tensors]  # what vLLM's layers hold
    pool = share(held)
    try:
        planes = planes_of(tensors, BLOCKS, pool.position)
        assert len(planes) == len(set(planes))
        for block in range(BLOCKS):
            assert bytes_of_block(kv_caches, block) == before[block]
            assert [read(pool, plane, block) for plane in planes] == before[block][: len(planes)]
        for tensor in held:
            tensor.fill_(7)  # a kernel writes
        for plane in planes:
            assert set(read(pool, plane, 1)) == set(torch.tensor(7.0).numpy().tobytes())
        last = planes[-1]  # a sidecar writes
        os.pwrite(pool.fd, bytes(last.block_bytes), last.offset + 2 * last.stride_bytes)
        assert bytes_of_block(kv_caches, 2)[len(planes) - 1] == bytes(last.block_bytes)
    finally:
        os.close(pool.fd)


def test_orders_tell_layouts_apart() -> None:
    orders = {order_of(make(), BLOCKS) for make in (one_storage, halves, ascend, ascend_mla)}
    assert len(orders) == 4
    assert order_of(ascend(), BLOCKS) == "16@1x2@2x8@3"


def token_major_split() -> dict[str, KvTensors]:
    return {layer: torch.randn(2 * BLOCKS, BLOCK // 2, HEADS, DIM) for layer in LAYERS}


@pytest.mark.parametrize(
    ("make", "heads", "axes", "cell"),
    [
        (one_storage, HEADS, ("head",), "16@2x16@3"),
        (halves, HEADS, ("head",), "16@2x8@3"),
        (ascend, HEADS, ("token", "head"), "8@3"),
        (ascend_mla, 1, ("token", "head"), "32@3|4@3"),
        (split_blocks, HEADS, ("part:2", "head"), "8@2x16@3"),
        (token_major_split, HEADS, ("token", "head"), "8@3"),
        (block_first, HEADS, ("head",), "16@2x16@3"),
        (one_storage, 4, (), "2@1x16@2x16@3"),  # no axis of that size
        (lambda: {"a": torch.randn(BLOCKS, BLOCK, BLOCK, DIM)}, BLOCK, (), "16@1x16@2x8@3"),  # two of them
        (lambda: {"a": torch.randn(BLOCKS, BLOCK, HEADS * DIM)}, HEADS, (), "16@1x16@2"),
    ],
)
def test_blocks_are_cut_at_heads_where_the_shapes_tell_them(
    make: Callable[[], dict[str, KvTensors]], heads: int, axes: tuple[str, ...], cell: str
) -> None:
    assert axes_of(make(), BLOCKS, BLOCK, heads) == axes
    assert order_of(make(), BLOCKS, axes) == cell


@pytest.mark.parametrize(
    "tensor", [torch.randn(3, 4, 5), torch.randn(4, BLOCKS, BLOCK), torch.randn(BLOCKS, 4, 8)[:, :, ::2]]
)
def test_a_tensor_of_no_known_kind_is_refused_by_name(tensor: torch.Tensor) -> None:
    position = {tensor.untyped_storage().data_ptr(): 0}
    with pytest.raises(ConnectorStartError, match=r"KV tensor of layers\.7"):
        planes_of([("layers.7", tensor)], BLOCKS, position)


def test_device_memory_is_refused_with_the_reason() -> None:
    with pytest.raises(ConnectorStartError, match="lies on meta: the sidecar takes KV in host memory only"):
        share([torch.empty(4, device="meta")])


def test_too_little_shared_memory_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 0, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(ConnectorStartError, match="--shm-size"):
        share([torch.randn(8)])

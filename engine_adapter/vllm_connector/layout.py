"""Where the blocks of vLLM's KV tensors lie: from tensors to the planes of a sidecar's layout (kv-contracts 1.7).

A layer gives one tensor, or a tuple of them (vllm-ascend: K and V, or MLA's pair). A tensor holds block b either at
t[b], or at t[0][b] and t[1][b] (keys, then values); what is inside a block does not matter here, only that it is dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from engine_adapter.vllm_connector.settings import ConnectorStartError
from sidecar.protocol import Plane

KvTensors = torch.Tensor | Sequence[torch.Tensor]


def tensors_of(kv_caches: Mapping[str, KvTensors]) -> list[tuple[str, torch.Tensor]]:
    """Every tensor with its layer's name, in the order of registration, which is the model's."""
    found: list[tuple[str, torch.Tensor]] = []
    for layer, tensors in kv_caches.items():
        several = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        found += [(layer, tensor) for tensor in several]
    return found


def planes_of(
    tensors: Iterable[tuple[str, torch.Tensor]], num_blocks: int, position: Mapping[int, int]
) -> tuple[Plane, ...]:
    """One plane a tensor, or two where keys and values lie apart; tensors that several layers share count once.

    `position` says where in the pool each storage begins, by its address. Raises ConnectorStartError.
    """
    planes: dict[Plane, None] = {}
    for layer, tensor in tensors:
        storage_at = position[tensor.untyped_storage().data_ptr()]
        for half in _halves(layer, tensor, num_blocks):
            planes[_plane(layer, half, num_blocks, storage_at)] = None
    return tuple(planes)


def _halves(layer: str, tensor: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """The tensor itself where blocks come first, its two halves where keys and values do."""
    shape = tuple(tensor.shape)
    if shape and shape[0] >= num_blocks and shape[0] % num_blocks == 0:
        return [tensor]
    if len(shape) > 1 and shape[0] == 2 and shape[1] % num_blocks == 0:
        return [tensor[0], tensor[1]]
    raise ConnectorStartError(
        f"the KV tensor of {layer} has shape {shape}, in which no axis counts the {num_blocks} blocks: "
        "BatonConnector knows attention with paged keys and values only"
    )


def _plane(layer: str, tensor: torch.Tensor, num_blocks: int, storage_at: int) -> Plane:
    """A kernel may split a block in several: then as many neighbouring rows are one block."""
    item_bytes = tensor.element_size()
    rows = tensor.shape[0] // num_blocks
    row_bytes = math.prod(tensor.shape[1:]) * item_bytes
    stride_bytes = tensor.stride(0) * item_bytes
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) + 1
    if reach * item_bytes != row_bytes or (rows > 1 and stride_bytes != row_bytes):
        raise ConnectorStartError(
            f"the KV tensor of {layer} has strides {tuple(tensor.stride())}: a block is not one piece of memory; "
            "leave the KV cache layout to vLLM's default"
        )
    return Plane(storage_at + int(tensor.storage_offset()) * item_bytes, stride_bytes * rows, row_bytes * rows)


def axes_of(kv_caches: Mapping[str, KvTensors], num_blocks: int, block_size: int, num_kv_heads: int) -> tuple[str, ...]:
    """What a block is made of, down to the heads (see sidecar's KvLayout); () where the shapes leave that open.

    vLLM is head-major on the CPU, and packs a head's tokens as its kernel likes; vllm-ascend is token-major.
    """
    found = {
        _axes_of_one(half, half.shape[0] // num_blocks, block_size, num_kv_heads)
        for layer, tensor in tensors_of(kv_caches)
        for half in _halves(layer, tensor, num_blocks)
    }
    return found.pop() if len(found) == 1 else ()


def _axes_of_one(tensor: torch.Tensor, rows: int, block_size: int, num_kv_heads: int) -> tuple[str, ...]:
    sizes = [tensor.shape[axis] for axis in _by_stride(tensor)]
    if len(sizes) != 3 or sizes[:2].count(num_kv_heads) != 1 or block_size % rows:
        return ()
    if sizes[0] == num_kv_heads:
        return ("head",) if rows == 1 else (f"part:{rows}", "head")
    return ("token", "head") if sizes[0] * rows == block_size else ()


def order_of(kv_caches: Mapping[str, KvTensors], num_blocks: int, known: Sequence[str] = ()) -> str:
    """The axes inside a block but the `known` ones, for the compatibility check: two engines' must be equal."""
    num_known = sum(not axis.startswith("part:") for axis in known)
    shapes: dict[Any, None] = {}
    for layer, tensor in tensors_of(kv_caches):
        for half in _halves(layer, tensor, num_blocks):
            shapes["x".join(f"{half.shape[axis]}@{axis}" for axis in _by_stride(half)[num_known:])] = None
    return "|".join(shapes)


def _by_stride(tensor: torch.Tensor) -> list[int]:
    """The axes of a block, outermost first."""
    strides = tensor.stride()
    return sorted(range(1, tensor.dim()), key=lambda axis: (-strides[axis], axis))

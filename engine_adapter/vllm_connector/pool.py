"""Moves the KV cache into shared memory, in place, so that the sidecar maps the pool that the kernels work on."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine_adapter.vllm_connector.settings import ConnectorStartError
from sidecar.protocol import Plane

logger = logging.getLogger(__name__)

SHM = "/dev/shm"


@dataclass(frozen=True, slots=True)
class SharedPool:
    """`position` says where each storage begins in the memory behind `fd`, by its address now."""

    fd: int
    position: dict[int, int]
    num_bytes: int


def share_fault(tensors: Sequence[torch.Tensor]) -> str:
    """Why the KV cache can't be moved into shared memory; "" if it can."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if any(tensor.device.type != "cpu" for tensor in tensors) or len(storages) != 1:
        return ""  # of several storages a copy is made, which goes without /dev/shm
    free, num_bytes = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize, sum(storages.values())
    return "" if free >= num_bytes else f"{SHM} has {free >> 20} MiB left for a KV cache of {num_bytes >> 20} MiB"


def positions(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Storages one after the other, without moving them: where each would begin, by its address."""
    found: dict[int, int] = {}
    end = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in found:
            found[storage.data_ptr()] = end
            end += storage.nbytes()
    return found


def byte_planes(
    tensors: Sequence[torch.Tensor], position: Mapping[int, int], planes: Sequence[Plane], num_blocks: int
) -> list[torch.Tensor]:
    """Each plane of the KV cache, where it lies, as bytes [blocks, bytes of a block]."""
    tensor_at = {position[tensor.untyped_storage().data_ptr()]: tensor for tensor in tensors}
    found = []
    for plane in planes:
        begin = max(begin for begin in tensor_at if begin <= plane.offset)
        storage = tensor_at[begin].untyped_storage()
        view = torch.empty(0, dtype=torch.uint8, device=tensor_at[begin].device)
        shape, strides = (num_blocks, plane.block_bytes), (plane.stride_bytes, 1)
        found.append(view.set_(storage, plane.offset - begin, shape, strides))
    return found


def slot_planes(memory: mmap.mmap, planes: Sequence[Plane], num_slots: int) -> list[torch.Tensor]:
    """Likewise the planes of a staging buffer, which have no gaps."""
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return [
        whole[plane.offset : plane.offset + num_slots * plane.block_bytes].view(num_slots, plane.block_bytes)
        for plane in planes
    ]


def share(tensors: Sequence[torch.Tensor]) -> SharedPool:
    """Move the storages behind `tensors`, keeping every byte. Raises ConnectorStartError where that can't be.

    One storage (vLLM 0.32) moves with every view of it. Several are gathered in one memory of ours and the given
    tensors pointed there; vLLM's layers hold these very tensors.
    """
    devices = {tensor.device.type for tensor in tensors}
    if devices != {"cpu"}:
        raise ConnectorStartError(
            f"the KV cache lies on {', '.join(sorted(devices))}: the sidecar takes KV in host memory only; "
            "run vLLM on CPU, or use vLLM's NixlConnector behind the same proxy"
        )
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    if len(storages) == 1:
        return _share_one(next(iter(storages.values())))
    return _gather(tensors, storages)


def _share_one(storage: torch.UntypedStorage) -> SharedPool:
    num_bytes = storage.nbytes()
    free = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize
    if free < num_bytes:
        raise ConnectorStartError(
            f"the KV cache has {num_bytes >> 20} MiB and {SHM} only {free >> 20} MiB left: give the container more "
            "shared memory (docker: --shm-size), or vLLM a smaller KV cache (VLLM_CPU_KVCACHE_SPACE)"
        )
    fd, _ = storage._share_fd_cpu_()
    return SharedPool(os.dup(fd), {storage.data_ptr(): 0}, num_bytes)


def _gather(tensors: Sequence[torch.Tensor], storages: dict[int, torch.UntypedStorage]) -> SharedPool:
    begins: dict[int, int] = {}
    end = 0
    for address, storage in storages.items():
        begins[address] = end
        end += -(-storage.nbytes() // mmap.PAGESIZE) * mmap.PAGESIZE
    fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, end)
    except OSError as error:
        os.close(fd)
        raise ConnectorStartError(
            f"no {end >> 20} MiB of memory for a shared copy of the KV cache ({error.strerror}): give vLLM a smaller "
            "one (VLLM_CPU_KVCACHE_SPACE)"
        ) from error
    pool = torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=end, dtype=torch.uint8).untyped_storage()
    # Layers may share a tensor, which must move once.
    views = {id(tensor): (tensor, tensor.untyped_storage().data_ptr()) for tensor in tensors}.values()
    for address, storage in storages.items():
        whole = torch.empty(0, dtype=torch.uint8).set_(pool, begins[address], (storage.nbytes(),), (1,))
        whole.copy_(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)))
    for tensor, address in views:
        offset = begins[address] // tensor.element_size() + tensor.storage_offset()
        tensor.set_(pool, offset, tuple(tensor.shape), tuple(tensor.stride()))
    return SharedPool(fd, {pool.data_ptr(): 0}, end)

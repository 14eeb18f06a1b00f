"""What differs between cpu, cuda and npu: the torch device, its memory, its copies, and the shapes that suit it.

`torch_npu` is imported here and nowhere else, and only when an NPU is asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class DeviceUnavailable(Exception):
    """The device can't be used here. `remedy` says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}: {remedy}")
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the host."""

    kind: str
    torch_device: torch.device
    max_prefill_tile: int
    """Rows of the largest prefill forward. 128 gives 90 % of the matmul speed of 512 on CPU (oneDNN, AVX-512)."""
    host_pool: bool
    """True where the KV pool is host memory that other processes can map."""
    default_dtype: torch.dtype
    """For a model whose config names a dtype that the device can't compute with at speed."""


def _open_cpu() -> Device:
    return Device("cpu", torch.device("cpu"), max_prefill_tile=128, host_pool=True, default_dtype=torch.float32)


def _open_cuda() -> Device:
    if not torch.cuda.is_available():
        raise DeviceUnavailable(
            "no CUDA device is visible to torch", "use --device cpu, or install a CUDA build of torch"
        )
    return Device("cuda", torch.device("cuda", 0), max_prefill_tile=512, host_pool=False, default_dtype=torch.bfloat16)


def _open_npu() -> Device:
    try:
        importlib.import_module("torch_npu")
    except ImportError as exc:
        raise DeviceUnavailable(f"torch_npu can't be imported ({exc})", "install pd-baton[npu] and CANN") from exc
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        raise DeviceUnavailable("no NPU is visible to torch_npu", "check npu-smi info and ASCEND_RT_VISIBLE_DEVICES")
    return Device("npu", torch.device("npu", 0), max_prefill_tile=512, host_pool=False, default_dtype=torch.bfloat16)


DEVICES: dict[str, Callable[[], Device]] = {"cpu": _open_cpu, "cuda": _open_cuda, "npu": _open_npu}


def open_device(kind: str) -> Device:
    """Raises DeviceUnavailable, KeyError for a kind that isn't in DEVICES."""
    return DEVICES[kind]()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BlockCopies:
    """Copies blocks between planes of KV and the staging planes in host memory, on a stream where the device has one.

    A plane is a tensor of bytes [blocks, bytes of a block]; staging plane i has the slots for plane i's blocks.
    """

    def __init__(self, kind: str, planes: Sequence[torch.Tensor], staging: Sequence[torch.Tensor]) -> None:
        self._pairs = list(zip(planes, staging, strict=True))
        self._backend: Any = None if kind == "cpu" else getattr(torch, kind)
        self._stream: Any = None if self._backend is None else self._backend.Stream()
        if kind == "cuda":  # pinned: copies run beside the kernels; without it they only wait for each other
            whole = staging[0].untyped_storage()
            runtime: Any = torch.cuda.cudart  # untyped
            runtime().cudaHostRegister(whole.data_ptr(), whole.nbytes(), 0)

    def out(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """(first block, first slot, how many): the blocks lie in their slots when this returns."""
        self._copy(runs, outwards=True)
        if self._stream is not None:
            self._stream.synchronize()

    def into(self, runs: Sequence[tuple[int, int, int]]) -> Callable[[], bool]:
        """Begin to copy slots into their blocks; the answer says whether they are there."""
        self._copy(runs, outwards=False)
        if self._stream is None:
            return lambda: True
        event = self._backend.Event()
        event.record(self._stream)
        done: Callable[[], bool] = event.query
        return done

    def _copy(self, runs: Sequence[tuple[int, int, int]], *, outwards: bool) -> None:
        if self._stream is None:
            self._copy_now(runs, outwards)
            return
        self._stream.wait_stream(self._backend.current_stream())  # kernels that still write or read these blocks
        with self._backend.stream(self._stream):
            self._copy_now(runs, outwards)

    def _copy_now(self, runs: Sequence[tuple[int, int, int]], outwards: bool) -> None:
        for blocks, slots in self._pairs:
            for block, slot, count in runs:
                there, here = blocks[block : block + count], slots[slot : slot + count]
                target, source = (here, there) if outwards else (there, here)
                target.copy_(source, non_blocking=True)


class Progress:
    """How far a device is with what was queued on its current stream; a CPU is done at once."""

    def __init__(self, kind: str) -> None:
        self._backend: Any = None if kind == "cpu" else getattr(torch, kind)

    def now(self) -> Callable[[], bool]:
        """Says whether all that is queued until now is done."""
        if self._backend is None:
            return lambda: True
        event = self._backend.Event()
        event.record()
        done: Callable[[], bool] = event.query
        return done

    def wait(self) -> None:
        """Until it is."""
        if self._backend is not None:
            self._backend.current_stream().synchronize()

"""The kinds of memory that come without a descriptor: one line each."""

from __future__ import annotations

from collections.abc import Callable

from sidecar.memory import acl, cuda
from sidecar.memory.contract import PoolRegion
from sidecar.memory.host import BorrowedRegion
from sidecar.protocol import PoolMemory

OPENERS: dict[str, Callable[[PoolMemory], PoolRegion]] = {
    "address": BorrowedRegion,
    "cuda_ipc": cuda.open_region,
    "npu_ipc": acl.open_region,
}
"""By PoolMemory.kind; each raises MemoryFault."""

OWN_PROCESS_ONLY = {"address"}
"""Kinds that mean nothing to another process."""

"""The driver's key for device memory, by which another process opens it. The calls, as the vendors document them.

CUDA exports a whole allocation: the key is of its base, and the memory lies at an offset. For an NPU the memory itself
is exported, which must be one that aclrtMalloc gave (kv-contracts section 5). Not run on hardware.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

CUDA_RUNTIME = ("libcudart.so", "libcudart.so.12", "libcudart.so.13", "libcudart.so.11.0")
CUDA_DRIVER = ("libcuda.so.1",)
ACL = ("libascendcl.so",)

CUDA_KEY_BYTES = 64
ACL_KEY_BYTES = 65
ACL_DISABLE_PID_VALIDATION = 1
"""ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION: the sidecar's pid in this one's namespace is not known."""


class NoKey(Exception):
    """The driver gives none; the message says what it said."""


def export_key(kind: str, address: int, num_bytes: int) -> tuple[bytes, int]:
    """(key, offset of the memory in what the key opens). `kind` is cuda or npu. Raises NoKey."""
    return EXPORTERS[kind](address, num_bytes)


def _export_cuda(address: int, num_bytes: int) -> tuple[bytes, int]:
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    driver = _load(CUDA_DRIVER)
    found = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    _check("cuMemGetAddressRange", found)
    if address + num_bytes > base.value + size.value:
        raise NoKey(f"{num_bytes} bytes at {address:#x} are not one allocation")
    key = ctypes.create_string_buffer(CUDA_KEY_BYTES)
    _check("cudaIpcGetMemHandle", _load(CUDA_RUNTIME).cudaIpcGetMemHandle(key, ctypes.c_void_p(base.value)))
    return key.raw, address - base.value


def _export_npu(address: int, num_bytes: int) -> tuple[bytes, int]:
    key = ctypes.create_string_buffer(ACL_KEY_BYTES)
    status = _load(ACL).aclrtIpcMemGetExportKey(
        ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), key, ctypes.c_size_t(ACL_KEY_BYTES),
        ctypes.c_uint64(ACL_DISABLE_PID_VALIDATION),
    )  # fmt: skip
    _check("aclrtIpcMemGetExportKey", status)
    return key.raw, 0


EXPORTERS: dict[str, Callable[[int, int], tuple[bytes, int]]] = {"cuda": _export_cuda, "npu": _export_npu}


def _load(names: tuple[str, ...]) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NoKey(f"none of {', '.join(names)} can be loaded")


def _check(call: str, status: int) -> None:
    if status != 0:
        raise NoKey(f"{call} failed with {status}")

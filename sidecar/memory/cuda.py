"""CUDA memory by its IPC handle, through the CUDA runtime's C functions. Not run on hardware yet."""

from __future__ import annotations

import ctypes

from sidecar.memory.device import DeviceRegion, check, load
from sidecar.protocol import PoolMemory

LIBRARIES = ("libcudart.so", "libcudart.so.12", "libcudart.so.13", "libcudart.so.11.0")
KEY_BYTES = 64
"""CUDA_IPC_HANDLE_SIZE."""
LAZY_ENABLE_PEER_ACCESS = 1
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
"""cudaMemcpyKind."""


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_char * KEY_BYTES),)


class _Driver:
    """See device.Driver."""

    def __init__(self, library: ctypes.CDLL, memory: PoolMemory) -> None:
        self._library = library
        self._device = memory.device
        self.enter_thread()
        base = ctypes.c_void_p()
        handle = _Handle.from_buffer_copy(memory.key.ljust(KEY_BYTES, b"\0"))
        check("cudaIpcOpenMemHandle", library.cudaIpcOpenMemHandle(ctypes.byref(base), handle, LAZY_ENABLE_PEER_ACCESS))
        self.base = base.value or 0

    def enter_thread(self) -> None:
        check("cudaSetDevice", self._library.cudaSetDevice(self._device))

    def to_host(self, host: int, device: int, num_bytes: int) -> None:
        self._copy(host, device, num_bytes, DEVICE_TO_HOST)

    def to_device(self, device: int, host: int, num_bytes: int) -> None:
        self._copy(device, host, num_bytes, HOST_TO_DEVICE)

    def close(self) -> None:
        self._library.cudaIpcCloseMemHandle(ctypes.c_void_p(self.base))

    def _copy(self, to: int, source: int, num_bytes: int, kind: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        check("cudaMemcpy", self._library.cudaMemcpy(ctypes.c_void_p(to), ctypes.c_void_p(source), size, kind))


def open_region(memory: PoolMemory) -> DeviceRegion:
    """Raises MemoryFault."""
    driver = _Driver(load(LIBRARIES), memory)
    return DeviceRegion(driver.base + memory.offset, memory.num_bytes, driver)

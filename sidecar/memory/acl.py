"""NPU memory by its export key, through ACL's C functions (CANN). Not run on hardware yet."""

from __future__ import annotations

import ctypes

from sidecar.memory.device import DeviceRegion, check, load
from sidecar.protocol import PoolMemory

LIBRARIES = ("libascendcl.so",)
ENABLE_PEER_ACCESS = 1
"""ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS."""
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
"""aclrtMemcpyKind."""
ALREADY_INITIALIZED = 100002
"""ACL_ERROR_REPEAT_INITIALIZE: an earlier registration has done it."""


class _Driver:
    """See device.Driver."""

    def __init__(self, library: ctypes.CDLL, memory: PoolMemory) -> None:
        self._library = library
        self._device = memory.device
        self._key = memory.key
        status = library.aclInit(None)
        check("aclInit", 0 if status == ALREADY_INITIALIZED else status)
        self.enter_thread()
        base = ctypes.c_void_p()
        status = library.aclrtIpcMemImportByKey(ctypes.byref(base), self._key, ctypes.c_uint64(ENABLE_PEER_ACCESS))
        check("aclrtIpcMemImportByKey", status)
        self.base = base.value or 0

    def enter_thread(self) -> None:
        check("aclrtSetDevice", self._library.aclrtSetDevice(self._device))

    def to_host(self, host: int, device: int, num_bytes: int) -> None:
        self._copy(host, device, num_bytes, DEVICE_TO_HOST)

    def to_device(self, device: int, host: int, num_bytes: int) -> None:
        self._copy(device, host, num_bytes, HOST_TO_DEVICE)

    def close(self) -> None:
        self._library.aclrtIpcMemClose(self._key)

    def _copy(self, to: int, source: int, num_bytes: int, kind: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        target, origin = ctypes.c_void_p(to), ctypes.c_void_p(source)
        check("aclrtMemcpy", self._library.aclrtMemcpy(target, size, origin, size, kind))


def open_region(memory: PoolMemory) -> DeviceRegion:
    """Raises MemoryFault."""
    driver = _Driver(load(LIBRARIES), memory)
    return DeviceRegion(driver.base + memory.offset, memory.num_bytes, driver)

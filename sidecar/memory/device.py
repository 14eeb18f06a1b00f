"""Device memory of an engine, opened in this process by the driver's key; bytes reach it through a host buffer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

from sidecar.memory.contract import MemoryFault, Piece


class Driver(Protocol):
    """What is needed of a vendor's library. Every call raises MemoryFault."""

    def enter_thread(self) -> None:
        """This thread will copy."""
        ...

    def to_host(self, host: int, device: int, num_bytes: int) -> None: ...

    def to_device(self, device: int, host: int, num_bytes: int) -> None: ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


class DeviceAccess:
    """See contract.PoolAccess: each piece goes through a buffer of its size."""

    def __init__(self, address: int, driver: Driver) -> None:
        self._address = address
        self._driver = driver
        self._entered = False
        self._buffer = bytearray()

    def to_send(self, piece: Piece) -> list[memoryview]:
        views = self.to_fill(piece)
        self._copy(piece, lambda host, device, size: self._driver.to_host(host, device, size))
        return views

    def to_fill(self, piece: Piece) -> list[memoryview]:
        num_bytes = sum(length for _, length in piece)
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        return [memoryview(self._buffer)[:num_bytes]]

    def filled(self, piece: Piece) -> None:
        self._copy(piece, lambda host, device, size: self._driver.to_device(device, host, size))

    def _copy(self, piece: Piece, copy: Callable[[int, int, int], None]) -> None:
        if not self._entered:
            self._driver.enter_thread()
            self._entered = True
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        for offset, length in piece:
            copy(host, self._address + offset, length)
            host += length


class DeviceRegion:
    """See contract.PoolRegion."""

    on_host = False

    def __init__(self, address: int, num_bytes: int, driver: Driver) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self._driver = driver
        self._open = True

    def access(self) -> DeviceAccess:
        return DeviceAccess(self.address, self._driver)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._driver.close()


def load(names: tuple[str, ...]) -> ctypes.CDLL:
    """The first library that is there. Raises MemoryFault."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise MemoryFault(f"none of {', '.join(names)} can be loaded; use memory provider staging")


def check(call: str, status: int) -> None:
    """Raise MemoryFault on any status but 0."""
    if status != 0:
        raise MemoryFault(f"{call} failed with {status}")

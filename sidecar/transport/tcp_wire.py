"""What both ends of a data connection have in common: see transport/tcp.py for who says what.

Blocking sockets and a mapped pool: bytes go straight between them, many spans a call.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from ctypes import c_int32
from itertools import accumulate

MAGIC = b"BATONKV2"
SECRET_BYTES = 32
GRANTED, REFUSED, NOT_LEASED = 0, 1, 2
LOST, HELD = b"\0", b"\1"
PAGE_BYTES = 4096
"""All that a producer sends is padded to it. Its thread then copies from a place in a page of the pool to the same
place in a page of the kernel's; shifted by a few bytes the copy takes three times as long (measured)."""
REQUEST = struct.Struct("<IQ")
MAX_SPANS = 1 << 20
"""Spans a request, 16 MiB of them; a transfer of more sends several requests."""
_ANSWER = struct.Struct("<BQ")

CHUNK_BYTES = 1 << 20
"""A call to the kernel moves this much at most: how long a stop waits, and how finely a cap is kept."""
MAX_VIEWS = 256
"""Spans a call to the kernel; its limit is 1,024."""


class DataFault(Exception):
    """The data connection cannot go on."""


def pieces(spans: Sequence[tuple[int, int]], max_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """(offset, bytes) in the same order, `max_bytes` and MAX_VIEWS at most together."""
    batch: list[tuple[int, int]] = []
    room = max_bytes
    for offset, length in spans:
        while length:
            size = min(length, room)
            batch.append((offset, size))
            offset, length, room = offset + size, length - size, room - size
            if not room or len(batch) == MAX_VIEWS:
                yield batch
                batch, room = [], max_bytes
    if batch:
        yield batch


def set_stall(sock: socket.socket, seconds: float) -> None:
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def spare_pacing(sock: socket.socket) -> None:
    """To a peer on this host nothing is lost and no queue builds up: bbr's timers would only cost time."""
    with contextlib.suppress(OSError):
        if sock.getpeername()[0] == sock.getsockname()[0]:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def receive(sock: socket.socket, num_bytes: int, *, may_end: bool = False) -> bytes:
    """Exactly `num_bytes`; b"" at an end that is allowed. Raises DataFault."""
    received = bytearray(num_bytes)
    return bytes(received) if fill(sock, [memoryview(received)], num_bytes, may_end=may_end) else b""


def receive_answer(sock: socket.socket) -> tuple[int, int]:
    """GRANTED or NOT_LEASED, and the number that comes with it. Raises DataFault."""
    page = receive(sock, PAGE_BYTES)
    status, number = _ANSWER.unpack_from(page)
    if status not in (GRANTED, NOT_LEASED):
        text = page[_ANSWER.size :][:number].decode(errors="replace")
        raise DataFault(f"the producer refused: {text}")
    return status, number


def answer(status: int, number: int) -> bytes:
    """What `receive_answer` takes."""
    return _ANSWER.pack(status, number).ljust(PAGE_BYTES, b"\0")


def refusal(why: str) -> bytes:
    """Likewise; it raises DataFault."""
    text = why.encode()[: PAGE_BYTES - _ANSWER.size]
    return (_ANSWER.pack(REFUSED, len(text)) + text).ljust(PAGE_BYTES, b"\0")


def ending(num_bytes: int, how: bytes) -> bytes:
    """What follows on so many bytes: HELD or LOST, and up to the end of a page."""
    return how.ljust(PAGE_BYTES + -num_bytes % PAGE_BYTES, b"\0")


def receive_ending(sock: socket.socket, num_bytes: int) -> bytes:
    """HELD or LOST. Raises DataFault."""
    return receive(sock, PAGE_BYTES + -num_bytes % PAGE_BYTES)[: len(HELD)]


def fill(sock: socket.socket, views: list[memoryview], num_bytes: int, *, may_end: bool = False) -> bool:
    """Receive until `views` are full; False at an end that is allowed. Raises DataFault."""
    got = 0
    while True:
        try:
            count = sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as error:
            raise DataFault("no byte came in time") from error
        except OSError as error:
            raise DataFault(f"receiving failed: {error.strerror}") from error
        got += count
        if got == num_bytes:
            return True
        if not count:
            if may_end and not got:
                return False
            raise DataFault("the stream ended in the middle")
        views = _rest(views, count)


def send(sock: socket.socket, views: list[memoryview]) -> None:
    """Send all of `views`. Raises DataFault."""
    left = sum(map(len, views))
    while left:
        try:
            count = sock.sendmsg(views)
        except BlockingIOError as error:
            raise DataFault("the other end did not read in time") from error
        except OSError as error:
            raise DataFault(f"sending failed: {error.strerror}") from error
        left -= count
        if left:
            views = _rest(views, count)


def _rest(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` after their first `count` bytes."""
    ends = list(accumulate(map(len, views)))
    index = bisect_right(ends, count)
    return [views[index][count - (ends[index] - len(views[index])) :], *views[index + 1 :]]


class Stop(threading.Event):
    """Set when a copy is to end; `flag` says it to C."""

    def __init__(self) -> None:
        super().__init__()
        self.flag = c_int32(0)

    def set(self) -> None:
        self.flag.value = 1
        super().set()


class Pace:
    """Shares a cap on bytes a second between threads; 0: none."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()
        self.chunk_bytes = min(CHUNK_BYTES, max(4096, bytes_per_s // 50)) if bytes_per_s else CHUNK_BYTES

    def wait(self, num_bytes: int, stopped: threading.Event) -> bool:
        """Wait for the turn of `num_bytes`; False if stopped meanwhile."""
        if not self.bytes_per_s:
            return not stopped.is_set()
        with self._lock:
            start = max(time.monotonic(), self._free_at)
            self._free_at = start + num_bytes / self.bytes_per_s
        return not stopped.wait(max(0.0, start - time.monotonic()))

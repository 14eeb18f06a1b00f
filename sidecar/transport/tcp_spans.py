"""Spans of a pool to and from a data connection. Used by transport/tcp.py.

By one call of `native/socket_spans.c` where that was built and the CPU reaches the pool. Else piece by piece, which is
also how memory of a device is reached and how a cap on the speed is kept.
"""

from __future__ import annotations

import errno
import os
import socket
from array import array
from collections.abc import Sequence
from ctypes import CDLL, POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import TypeAlias

from sidecar.copy_library import native_library
from sidecar.memory.contract import PoolRegion
from sidecar.spans import Spans, check_spans
from sidecar.transport.tcp_wire import CHUNK_BYTES, DataFault, Pace, Stop, fill, pieces, send

_ENDED, _STOPPED = -1, -2


def _load() -> CDLL | None:
    library = native_library("_socket_spans")
    if library is not None:
        library.total_bytes.argtypes = (c_void_p, c_int64, c_uint64)
        library.total_bytes.restype = c_int64
        library.send_spans.argtypes = (c_int, c_char_p, c_size_t, c_void_p, c_void_p, c_int64)
        library.receive_spans.argtypes = (c_int, c_void_p, c_void_p, c_int64, POINTER(c_int32))
    return library


_library = _load()

Pairs: TypeAlias = "array[int]"
"""Of type Q: the offset of a span and its bytes, of the next one and so on, as a request on the wire has them."""


def pairs(offsets: Sequence[int], lengths: Sequence[int]) -> Pairs:
    made = array("Q", bytes(16 * len(lengths)))
    made[0::2], made[1::2] = _column(offsets), _column(lengths)
    return made


def move(spans: Pairs, offsets: Sequence[int]) -> None:
    """The same lengths at other offsets."""
    spans[0::2] = _column(offsets)


class SpanStream:
    """A pool's bytes to and from sockets. For one thread; of no use once the region is closed."""

    def __init__(self, region: PoolRegion) -> None:
        self._region = region
        self._pool = region.access()
        self._library = _library if region.on_host else None

    def total(self, spans: Pairs) -> int:
        """The bytes of all of them. Raises Refusal("invalid") if one leaves the pool."""
        num_bytes = self._region.num_bytes
        if self._library is not None:
            total = int(self._library.total_bytes(_address(spans), len(spans) // 2, num_bytes))
            if total >= 0:
                return total
        starts, lengths = spans[0::2], spans[1::2]
        check_spans(Spans(starts, [0] * len(lengths), lengths), num_bytes, num_bytes)
        return sum(lengths)

    def send(self, sock: socket.socket, head: bytes, spans: Pairs) -> None:
        """`head` and then spans that `total` has let through. Raises DataFault, MemoryFault."""
        if self._library is None:
            send(sock, [memoryview(head)])
            for piece in pieces(_tuples(spans), CHUNK_BYTES):
                send(sock, self._pool.to_send(piece))
            return
        given = _address(spans), len(spans) // 2
        failure = self._library.send_spans(sock.fileno(), head, len(head), self._region.address, *given)
        if failure == errno.EAGAIN:
            raise DataFault("the other end did not read in time")
        if failure:
            raise DataFault(f"sending failed: {os.strerror(failure)}")

    def receive(self, sock: socket.socket, spans: Pairs, pace: Pace, stop: Stop) -> bool:
        """Fill spans of the pool; False if stopped meanwhile. Raises DataFault, MemoryFault."""
        if self._library is None or pace.bytes_per_s:
            return self._receive_pieces(sock, spans, pace, stop)
        given = _address(spans), len(spans) // 2
        failure = self._library.receive_spans(sock.fileno(), self._region.address, *given, byref(stop.flag))
        if failure == _ENDED:
            raise DataFault("the stream ended in the middle")
        if failure == errno.EAGAIN:
            raise DataFault("no byte came in time")
        if failure not in (0, _STOPPED):
            raise DataFault(f"receiving failed: {os.strerror(failure)}")
        return not failure

    def _receive_pieces(self, sock: socket.socket, spans: Pairs, pace: Pace, stop: Stop) -> bool:
        for piece in pieces(_tuples(spans), pace.chunk_bytes):
            num_bytes = sum(length for _, length in piece)
            if not pace.wait(num_bytes, stop):
                return False
            fill(sock, self._pool.to_fill(piece), num_bytes)
            self._pool.filled(piece)
        return True


def _column(numbers: Sequence[int]) -> Pairs:
    return array("Q", numbers.tobytes() if isinstance(numbers, array) and numbers.itemsize == 8 else numbers)


def _tuples(spans: Pairs) -> list[tuple[int, int]]:
    return list(zip(spans[0::2], spans[1::2], strict=True))


def _address(spans: Pairs) -> int:
    return spans.buffer_info()[0]

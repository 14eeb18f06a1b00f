"""The limit of TCP on this machine: one connection between two processes, as plain as Python has it."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator

CALL_BYTES = 1 << 20


def _stream(port: int) -> None:
    """Send as many bytes as each eight that come say, from one buffer."""
    buffer = memoryview(bytes([7]) * CALL_BYTES)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        while request := sock.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(request, "big")
            while left:
                size = min(left, CALL_BYTES)
                sock.sendall(buffer[:size])
                left -= size


@contextlib.contextmanager
def plain_sockets() -> Iterator[Callable[[int], float]]:
    """A function that has so many bytes sent over one connection into one buffer, and gives the seconds it took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)  # should the other process not come up
        sender = multiprocessing.get_context("spawn").Process(target=_stream, args=(listener.getsockname()[1],))
        sender.start()
        sock, _ = listener.accept()
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(CALL_BYTES))

    def receive(num_bytes: int) -> float:
        started = time.perf_counter()
        sock.sendall(num_bytes.to_bytes(8, "big"))
        left = num_bytes
        while left:
            left -= sock.recv_into(buffer[: min(left, CALL_BYTES)])
        return time.perf_counter() - started

    try:
        yield receive
    finally:
        sock.close()
        sender.join()

"""A process that holds one client of Mooncake Store, because a call of it may block or spin for as long as it likes.

Started as `python -m sidecar.store.mooncake_process FD PARENT`, where FD is a socket to the sidecar: one request, one
answer, in order. The sidecar kills it when an answer is late; it dies with the sidecar.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

import msgspec

from sidecar.transport.mooncake import ENVIRONMENT, die_with_parent, missing

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 30


class Setup(msgspec.Struct, tag=True, frozen=True):
    """The first request; answered by True, or by what is wrong."""

    host: str
    master: str
    segment_bytes: int
    buffer_bytes: int
    protocol: str
    device: str


class Has(msgspec.Struct, tag=True, frozen=True):
    """Answered by a list of bools."""

    names: list[str]


class Get(msgspec.Struct, tag=True, frozen=True):
    """Answered by bytes, empty where there are none."""

    name: str


class Put(msgspec.Struct, tag=True, frozen=True):
    """Answered by the status: 0 is good."""

    name: str
    value: bytes


class Leave(msgspec.Struct, tag=True, frozen=True):
    """The last request: take the segment back, so that nobody is sent there. Answered by True."""


Request = Setup | Has | Get | Put | Leave
Answer = bool | str | list[bool] | bytes | int
requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_encoder = msgspec.msgpack.Encoder()


def send(sock: socket.socket, message: object) -> None:
    """One frame. Raises OSError."""
    payload = _encoder.encode(message)
    sock.sendall(len(payload).to_bytes(LENGTH_BYTES, "big"))
    sock.sendall(payload)


def receive(sock: socket.socket) -> bytearray:
    """One frame's payload. Raises OSError, also at the end of the stream."""
    length = int.from_bytes(_receive_exactly(sock, LENGTH_BYTES), "big")
    if length > MAX_FRAME_BYTES:
        raise OSError(f"a frame of {length} bytes")
    return _receive_exactly(sock, length)


def _receive_exactly(sock: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        num_read = sock.recv_into(view)
        if num_read == 0:
            raise OSError("the other end closed the connection")
        view = view[num_read:]
    return buffer


class Client:
    """Mooncake's client, by our requests."""

    def __init__(self) -> None:
        self._store: Any = None

    def answer(self, request: Request) -> Answer:
        if isinstance(request, Setup):
            return self._set_up(request)
        if isinstance(request, Has):
            return [status == 1 for status in self._store.batch_is_exist(request.names)]
        if isinstance(request, Get):
            return bytes(self._store.get(request.name))
        if isinstance(request, Leave):
            self._store.close()
            return True
        return int(self._store.put(request.name, request.value))

    def _set_up(self, setup: Setup) -> Answer:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            return missing() or f"Mooncake cannot be imported: {error}"
        self._store = MooncakeDistributedStore()
        status = self._store.setup(
            setup.host, "P2PHANDSHAKE", setup.segment_bytes, setup.buffer_bytes, setup.protocol, setup.device,
            setup.master,
        )  # fmt: skip
        return True if status == 0 else f"Mooncake Store did not start with the master {setup.master} (status {status})"


def serve(sock: socket.socket) -> None:
    """Answer until the sidecar's end of the socket closes."""
    inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sock, inbox), name="parent", daemon=True).start()
    client = Client()
    while True:
        send(sock, client.answer(inbox.get()))


def _listen(sock: socket.socket, inbox: queue.SimpleQueue[Request]) -> None:
    try:
        while True:
            inbox.put(requests.decode(receive(sock)))
    except (OSError, msgspec.DecodeError):
        pass
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))

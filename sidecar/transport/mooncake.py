"""A process that holds one Mooncake TransferEngine: it serves a pool to others, or reads one peer's pool into ours.

Why a process each: after an error or a time-out the engine goes on writing into the caller's blocks and cannot be
cancelled (measured: hundreds of blocks after -1 was returned), its destructor holds the interpreter's lock for a
second, a hung first contact blocks every other peer of the same engine, and a bad id is a segfault. Killing the
process is a fence that works at once, and the event loop never waits. The parent's side is mooncake_process.py.

Started as `python -m sidecar.transport.mooncake FD`, where FD is a socket to the parent: frames both ways.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sidecar.errors import FrameError
from sidecar.framing import FrameDecoder, encode_frame
from sidecar.protocol import Message, decode, encode
from sidecar.regions import Region

ENVIRONMENT = {
    "MC_TE_METADATA_REFRESH_INTERVAL_SECONDS": "1",  # a peer restarted under its old address is found again
    "MC_TRANSFER_TIMEOUT": "5",  # the floor
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "3",
    "MC_TCP_SLICE_SIZE": str(1 << 20),  # six per cent over the default
    "MC_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
}
"""Set before the import, which reads them; what the operator has set already stands."""

LIBRARIES = {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}
"""What the wheel does not bring, and the Debian package that has it."""

MAX_SPANS = 1024
"""Spans a call; over 2,052 the engine fails the call and writes most of it later."""
MAX_BATCH_BYTES = 16 << 20
"""How much one transfer may move before the next one's turn: some 10 ms."""
MAX_SPAN_BYTES = 1 << 20
"""A span is one request on one of four lanes; smaller pieces let the lanes share a long one."""
SPAN_COST_S = 15e-6
"""What a span costs whatever its size (measured)."""
FIRST_RATE_BYTES_PER_S = 2 << 30
MAX_RATE_BYTES_PER_S = 16 << 30
SLEPT_SHARE = 0.85
"""Of the expected time; the rest is waited for by a spinning status call."""
OVERSLEPT_S = 200e-6
"""A status call that is through in less had nothing to wait for: the batch was over before, nobody knows when."""
MAX_FRAME_BYTES = 256 << 20


class Start(Message, tag="start", frozen=True):
    """The first message. `pool_fd` is inherited. With `session` the engine reads from there, without it serves."""

    pool_fd: int
    pool_bytes: int
    host: str
    protocol: str
    device: str
    session: str = ""
    remote_address: int = 0
    bytes_per_s: int = 0


class Started(Message, tag="started", frozen=True):
    session: str
    base_address: int


class Read(Message, tag="read", frozen=True):
    """`spans` as in sidecar.spans."""

    copy_id: int
    spans: list[tuple[int, int, int]]


class Stop(Message, tag="stop", frozen=True):
    copy_id: int


class CopyEnded(Message, tag="copy_ended", frozen=True):
    """Nothing of this copy is on its way any more; `completed` is False if it was stopped."""

    copy_id: int
    completed: bool


class Fault(Message, tag="fault", frozen=True):
    """Something failed; the parent must kill this process before it believes that nothing writes."""

    message: str


to_child: msgspec.msgpack.Decoder[Start | Read | Stop] = msgspec.msgpack.Decoder(Start | Read | Stop)
to_parent: msgspec.msgpack.Decoder[Started | CopyEnded | Fault] = msgspec.msgpack.Decoder(Started | CopyEnded | Fault)


class EngineFault(Exception):
    """Mooncake cannot do what was asked."""


def missing() -> str:
    """What this machine lacks to run Mooncake, in a sentence with the remedy; "" if nothing is known to be missing."""
    if importlib.util.find_spec("mooncake") is None:
        return "the Python package of Mooncake is missing: pip install 'pd-baton[mooncake]'"
    lacking = []
    for library, package in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            lacking.append((library, package))
    if not lacking:
        return ""
    libraries = ", ".join(library for library, _ in lacking)
    return f"Mooncake needs {libraries}: apt-get install {' '.join(package for _, package in lacking)}"


def open_engine(host: str, protocol: str, device: str) -> Any:
    """An initialized TransferEngine that really runs `protocol`. Raises EngineFault."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise EngineFault(missing() or f"Mooncake cannot be imported: {error}") from error
    engine = TransferEngine()
    status = engine.initialize(host, "P2PHANDSHAKE", protocol, device)
    if status != 0:
        raise EngineFault(f"Mooncake did not start with protocol {protocol!r} and device {device!r} (status {status})")
    if fault := protocol_fault(protocol):
        raise EngineFault(fault)
    return engine


def protocol_fault(protocol: str) -> str:
    """Why the engine of this process does not run `protocol`; initialize accepts any name and falls back to tcp."""
    if protocol == "ascend" and "libascendcl" not in Path("/proc/self/maps").read_text():
        return "Mooncake was asked for ascend but this build runs without CANN: install its -npu wheel and CANN"
    if protocol == "rdma" and not any(link.startswith("/dev/infiniband/") for link in _open_files()):
        return "Mooncake was asked for rdma but opened no RDMA device: see ibv_devices, or take --mooncake-protocol tcp"
    return ""


def _open_files() -> list[str]:
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    return links


class _Job:
    """One copy: what is left of it."""

    def __init__(self, read: Read) -> None:
        self.copy_id = read.copy_id
        self.spans = deque(read.spans)

    def next_batch(self, max_bytes: int) -> list[tuple[int, int, int]]:
        batch: list[tuple[int, int, int]] = []
        room = max_bytes
        while self.spans and room > 0 and len(batch) < MAX_SPANS:
            remote, local, length = self.spans.popleft()
            size = min(length, room, MAX_SPAN_BYTES)
            batch.append((remote, local, size))
            room -= size
            if size < length:
                self.spans.appendleft((remote + size, local + size, length - size))
        return batch


class _Reader:
    """Reads one peer's pool, batch by batch, a batch of each waiting copy in turn."""

    def __init__(self, engine: Any, start: Start, local_address: int, inbox: queue.SimpleQueue[Message]) -> None:
        self._engine = engine
        self._start = start
        self._local_address = local_address
        self._inbox = inbox
        self._jobs: deque[_Job] = deque()
        self._rate = float(FIRST_RATE_BYTES_PER_S)
        self._batch_bytes = min(MAX_BATCH_BYTES, max(4096, start.bytes_per_s // 50) if start.bytes_per_s else 1 << 62)

    def run(self, send: Any) -> None:
        """For ever. Raises EngineFault."""
        while True:
            self._take_messages(send)
            job = self._jobs.popleft()
            batch = job.next_batch(self._batch_bytes)
            self._transfer(batch)
            if job.spans:
                self._jobs.append(job)
            else:
                send(CopyEnded(job.copy_id, True))

    def first_contact(self) -> None:
        """Connect to the peer now, off every transfer's path."""
        scratch = (ctypes.c_char * 64)()
        status = self._engine.transfer_sync_read(
            self._start.session, ctypes.addressof(scratch), self._start.remote_address, len(scratch)
        )
        if status != 0:
            raise EngineFault(f"Mooncake cannot read from {self._start.session} (status {status})")

    def _take_messages(self, send: Any) -> None:
        """Everything that has come; waits while there is nothing to copy."""
        while not self._jobs or not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Read):
                self._jobs.append(_Job(message))
                continue
            assert isinstance(message, Stop)
            for job in [job for job in self._jobs if job.copy_id == message.copy_id]:
                self._jobs.remove(job)
                send(CopyEnded(job.copy_id, False))

    def _transfer(self, batch: Sequence[tuple[int, int, int]]) -> None:
        num_bytes = sum(length for _, _, length in batch)
        started_at = time.monotonic()
        batch_id = self._engine.batch_transfer_async_read(
            self._start.session,
            [self._local_address + local for _, local, _ in batch],
            [self._start.remote_address + remote for remote, _, _ in batch],
            [length for _, _, length in batch],
        )
        if batch_id == 0:  # never to be asked about: its status call is a segfault
            raise EngineFault(f"Mooncake refused a batch of {len(batch)} spans, {num_bytes} bytes")
        fixed_s = len(batch) * SPAN_COST_S
        time.sleep(SLEPT_SHARE * (fixed_s + num_bytes / self._rate))
        woken_at = time.monotonic()
        status = self._engine.get_batch_transfer_status([batch_id])
        if status != 0:
            raise EngineFault(f"Mooncake failed a batch of {len(batch)} spans, {num_bytes} bytes (status {status})")
        ended_at = time.monotonic()
        took_s = ended_at - started_at
        if num_bytes >= 1 << 18 and ended_at - woken_at < OVERSLEPT_S:
            self._rate = min(1.5 * self._rate, float(MAX_RATE_BYTES_PER_S))
        elif num_bytes >= 1 << 18:
            self._rate += 0.3 * (num_bytes / max(took_s - fixed_s, took_s / 4) - self._rate)
        if self._start.bytes_per_s:
            time.sleep(max(0.0, num_bytes / self._start.bytes_per_s - took_s))


def serve_child(sock: socket.socket) -> None:
    """The life of the process: start, then serve or read until the parent's end of the socket closes."""
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def send(message: Message) -> None:
        sock.sendall(encode_frame(encode(message)))

    threading.Thread(target=_listen, args=(sock, inbox), name="parent", daemon=True).start()
    try:
        start = inbox.get()
        assert isinstance(start, Start)
        engine = open_engine(start.host, start.protocol, start.device)
        serving = not start.session
        # Over tcp the served pool is only ever read, and mapped so: Mooncake's port lets anyone write who knows it.
        region = Region(start.pool_fd, start.pool_bytes, writable=not serving or start.protocol != "tcp")
        if (serving or start.protocol != "tcp") and engine.register_memory(region.address, region.num_bytes) != 0:
            raise EngineFault(f"Mooncake did not register the pool of {region.num_bytes} bytes")
        if serving:
            send(Started(f"{start.host}:{engine.get_rpc_port()}", region.address))
            threading.Event().wait()
        reader = _Reader(engine, start, region.address, inbox)
        reader.first_contact()
        send(Started("", region.address))
        reader.run(send)
    except (EngineFault, OSError) as error:
        send(Fault(str(error)))
        threading.Event().wait()  # the parent kills; an orderly end would go on writing for a second


def _listen(sock: socket.socket, inbox: queue.SimpleQueue[Message]) -> None:
    decoder = FrameDecoder(MAX_FRAME_BYTES)
    try:
        while chunk := sock.recv(1 << 20):
            for frame in decoder.feed(chunk):
                inbox.put(decode(to_child, frame))
    except (OSError, FrameError):
        pass
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the sidecar dies, whatever its threads are doing."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve_child(socket.socket(fileno=int(sys.argv[1])))

"""Between hosts without RDMA: the consumer asks for a list of spans, the producer streams them from its pool.

A data connection carries, in this order, the last three for each transfer:

    consumer   MAGIC, secret (32 bytes)       once, answered by GRANTED and whether marks are checked, or REFUSED
    consumer   number of spans, mark or 0, then (offset, bytes) of each
    producer   GRANTED and the sum of the bytes, NOT_LEASED, or REFUSED, the length of a sentence and the sentence
    producer   the bytes, one span after the other, then HELD or LOST

Numbers are little-endian, as every machine that this runs on. The secret comes over the control connection, which has
checked who asks. Both ends use blocking calls in threads, which run without the interpreter's lock, straight between
socket and pool, and what waits unsent is at most the kernel's buffers. A transfer has a connection of its own while it
lasts, so that none holds back another. A stopped copy shuts its connection down, and has ended when its thread is out
of the kernel: then nothing writes.

A mark stands for a lease that is read without a claim (see lease_board). It has to be on the producer's board before
the first byte is read from the pool, and HELD says that it still was after the last: so all the bytes were leased, and
two round trips are saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from functools import partial

from sidecar.config import SidecarConfig, split_address
from sidecar.connection import end_when_gone
from sidecar.errors import Refusal
from sidecar.lease_board import LeaseBoard
from sidecar.memory.contract import MemoryFault, PoolRegion
from sidecar.protocol import RegionOpened
from sidecar.registration import Registration
from sidecar.spans import Spans
from sidecar.transport.contract import COPIED, STOPPED, VOID, PendingCopy, Served
from sidecar.transport.tcp_serving import Serving
from sidecar.transport.tcp_spans import SpanStream, move, pairs
from sidecar.transport.tcp_wire import (
    HELD,
    MAGIC,
    MAX_SPANS,
    NOT_LEASED,
    REQUEST,
    DataFault,
    Pace,
    Stop,
    receive_answer,
    receive_ending,
    send,
    set_stall,
)  # fmt: skip

logger = logging.getLogger(__name__)

MAX_EARLY_SPANS = 2048
"""A request of no more is sent by the event loop's thread: the producer begins before a thread of ours is awake."""
MAX_STREAMS = 8
"""Connections to one producer: transfers beyond it wait for one."""


class TcpCopy(PendingCopy):
    """One transfer's copy; its thread calls `begin`, `leave` and `end`.

    `early` is the connection over which it has been asked for already, but for `unsent`.
    """

    def __init__(self, spans: Spans, mark: int) -> None:
        super().__init__()
        self.spans = spans
        self.mark = mark
        self.early: socket.socket | None = None
        self.unsent = b""
        self.stopped = Stop()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None

    def stop(self) -> None:
        with self._lock:
            self.stopped.set()
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def begin(self, sock: socket.socket) -> bool:
        """From now on `stop` shuts `sock` down; False if the copy was stopped already."""
        with self._lock:
            self._sock = sock
            return not self.stopped.is_set()

    def leave(self) -> bool:
        """`stop` leaves the connection alone from now on; False if it was shut down already."""
        with self._lock:
            self._sock = None
            return not self.stopped.is_set()

    def end(self, outcome: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed: then nobody waits
            self._loop.call_soon_threadsafe(self._finish, outcome)


Connect = Callable[[Callable[[socket.socket], object]], tuple[socket.socket, bool]]


class TcpMemory:
    """See contract.PeerMemory. A thread and a connection for each copy under way, MAX_STREAMS at most."""

    transport = "tcp"

    def __init__(
        self, local: PoolRegion, pace: Pace, connect: Connect, first: socket.socket, *, checks_marks: bool
    ) -> None:
        self.checks_marks = checks_marks
        self._local = local
        self._pace = pace
        self._connect = connect
        self._idle_sockets = [first]
        self._waiting: queue.SimpleQueue[TcpCopy | None] = queue.SimpleQueue()
        self._copies: set[TcpCopy] = set()
        self._threads: list[threading.Thread] = []
        self.broken = ""

    def read(self, spans: Spans, mark: int = 0) -> PendingCopy:
        if self.broken:
            raise Refusal("transport", self.broken)
        copy = TcpCopy(spans, mark)
        self._copies.add(copy)
        copy.ended.add_done_callback(lambda _: self._copies.discard(copy))
        if len(self._copies) > len(self._threads) < MAX_STREAMS:
            thread = threading.Thread(target=self._work, name="tcp-read", daemon=True)
            self._threads.append(thread)
            thread.start()
        thread_is_free = len(self._copies) <= len(self._threads)
        if thread_is_free and len(spans) <= min(MAX_EARLY_SPANS, MAX_SPANS) and (sock := self._idle_socket()):
            self._ask_early(copy, sock)
        self._waiting.put(copy)
        return copy

    @staticmethod
    def _ask_early(copy: TcpCopy, sock: socket.socket) -> None:
        """Send the request, as far as the kernel takes it at once; there is a thread free for the answer."""
        request = b"".join((REQUEST.pack(len(copy.spans), copy.mark), pairs(copy.spans.remote, copy.spans.lengths)))
        sent = 0
        with contextlib.suppress(OSError):  # the thread comes upon it again
            sent = sock.send(request, socket.MSG_DONTWAIT)
        copy.begin(sock)
        copy.early, copy.unsent = sock, request[sent:]

    async def close(self) -> None:
        self.broken = self.broken or "its connection to the producer was closed"
        for copy in list(self._copies):
            copy.stop()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        while sock := self._idle_socket():
            sock.close()
        while self._copies:
            await asyncio.wait([copy.ended for copy in self._copies])

    def _idle_socket(self) -> socket.socket | None:
        """On any thread."""
        try:
            return self._idle_sockets.pop()
        except IndexError:
            return None

    def _work(self) -> None:
        stream = SpanStream(self._local)
        while (copy := self._waiting.get()) is not None:
            outcome = STOPPED
            try:
                if copy.early is not None:
                    outcome = self._run(copy, copy.early, stream)
                elif not copy.stopped.is_set():
                    outcome = self._run(copy, self._idle_socket() or self._connect(copy.begin)[0], stream)
            except (DataFault, MemoryFault) as fault:
                if not copy.stopped.is_set():
                    outcome = self.broken = str(fault)
            except Exception as error:  # the last resort: a copy that never ends would hold its pull for ever
                logger.exception("tcp_read_crashed")
                outcome = self.broken = f"internal error: {error!r}"
            copy.end(outcome)

    def _run(self, copy: TcpCopy, sock: socket.socket, stream: SpanStream) -> str:
        """Ask and receive; the connection is kept only if it all came. Raises DataFault."""
        outcome = STOPPED
        try:
            if copy.begin(sock):
                outcome = self._transfer(copy, sock, stream)
        finally:
            if copy.leave() and outcome != STOPPED:
                self._idle_sockets.append(sock)
            else:
                sock.close()
        return outcome

    def _transfer(self, copy: TcpCopy, sock: socket.socket, stream: SpanStream) -> str:
        """COPIED, STOPPED or VOID. Raises DataFault, MemoryFault."""
        spans = copy.spans
        if len(spans) <= MAX_SPANS:
            return self._request(spans, copy, sock, stream)
        outcome = COPIED
        for first in range(0, len(spans), MAX_SPANS):
            if outcome == COPIED:
                outcome = self._request(spans.part(first, first + MAX_SPANS), copy, sock, stream)
        return outcome

    def _request(self, spans: Spans, copy: TcpCopy, sock: socket.socket, stream: SpanStream) -> str:
        """As many spans as the producer takes at once."""
        if copy.early is None:
            wanted = pairs(spans.remote, spans.lengths)
            send(sock, [memoryview(REQUEST.pack(len(spans), copy.mark)), memoryview(wanted).cast("B")])
            move(wanted, spans.local)  # while the answer is on its way
        else:
            send(sock, [memoryview(copy.unsent)])
            wanted = pairs(spans.local, spans.lengths)
        status, number = receive_answer(sock)
        if status == NOT_LEASED and copy.mark:
            return VOID
        if number != spans.num_bytes:
            raise DataFault(f"the producer would send {number} bytes instead of {spans.num_bytes}")
        if not stream.receive(sock, wanted, self._pace, copy.stopped):
            return STOPPED
        return VOID if receive_ending(sock, number) != HELD and copy.mark else COPIED


class TcpTransport:
    """See contract.Transport."""

    name = "tcp"
    needs_same_host = False

    def __init__(self, config: SidecarConfig, host: str, board: LeaseBoard | None = None) -> None:
        """`board`: which leases of our pools are valid; without it each has to be claimed."""
        self._board = board
        self._listen_host = split_address(config.listen)[0]
        self._host = host
        self._config = config
        self._pace = Pace(config.copy_bytes_per_s)
        self._serving: dict[str, Serving] = {}

    def registered(self, registration: Registration) -> None:
        """A listener costs nothing: it is made for the first peer that asks."""

    async def serve(self, registration: Registration) -> Served:
        serving = self._serving.get(registration.epoch)
        if serving is None:
            serving = Serving(registration, self._listen_host, self._host, self._config, self._board)
            self._serving[registration.epoch] = serving
        return Served(serving.session)

    async def open(self, registration: Registration, opened: RegionOpened, fd: int | None) -> TcpMemory:
        if fd is not None:
            os.close(fd)
        try:
            host, port, secret = opened.session.split(" ")
            connect = partial(_connect, host, int(port), secret.encode(), self._config)
        except ValueError as error:
            raise Refusal("transport", "the producer's data address makes no sense") from error
        connecting = asyncio.ensure_future(asyncio.to_thread(connect, lambda _: None))
        try:
            first, checks_marks = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_result)
            raise
        except DataFault as fault:
            raise Refusal("transport", str(fault)) from fault
        return TcpMemory(registration.region, self._pace, connect, first, checks_marks=checks_marks)

    async def retire(self, registration: Registration) -> None:
        serving = self._serving.pop(registration.epoch, None)
        if serving is not None:
            for thread in serving.close():
                await asyncio.to_thread(thread.join)

    def fault(self) -> str:
        return ""


def _connect(
    host: str, port: int, secret: bytes, config: SidecarConfig, begin: Callable[[socket.socket], object]
) -> tuple[socket.socket, bool]:
    """A data connection, its hello answered, and whether marks are checked at its other end. Raises DataFault.

    `begin` may shut it down from when it has it.
    """
    try:
        sock = socket.create_connection((host, port), config.connect_timeout_s)
    except (OSError, OverflowError) as error:
        raise DataFault(f"the data port at {host}:{port} cannot be reached: {error}") from error
    try:
        set_stall(sock, config.connect_timeout_s)
        end_when_gone(sock, config.peer_gone_s)
        begin(sock)
        send(sock, [memoryview(MAGIC + secret)])
        _, checks_marks = receive_answer(sock)
        set_stall(sock, config.stall_timeout_s)
    except BaseException:
        sock.close()
        raise
    return sock, bool(checks_marks)


def _close_result(done: asyncio.Future[tuple[socket.socket, bool]]) -> None:
    """The one who asked has left."""
    if not done.cancelled() and done.exception() is None:
        done.result()[0].close()

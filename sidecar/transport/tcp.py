"""Between hosts without RDMA: the consumer asks for a list of spans, the producer streams them from its pool.

A data connection carries, in this order, the last three for each transfer:

    consumer   MAGIC, secret (32 bytes)                         once, answered by GRANTED or REFUSED
    consumer   number of spans, then (offset, bytes) of each
    producer   GRANTED and the sum of the bytes, or REFUSED, the length of a sentence and the sentence
    producer   the bytes, one span after the other

Numbers are little-endian, as every machine that this runs on. The secret comes over the control connection, which has
checked who asks. Both ends use blocking calls in threads: sendmsg and recvmsg_into run without the interpreter's lock,
straight between socket and pool, and what waits unsent is at most the kernel's buffers. A transfer has a connection of
its own while it lasts, so that none holds back another. A stopped copy shuts its connection down, and has ended when
its thread is out of the kernel: then nothing writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import queue
import secrets
import socket
import struct
import threading
from array import array
from collections.abc import Callable
from functools import partial

from sidecar.config import SidecarConfig, split_address
from sidecar.connection import end_when_gone
from sidecar.errors import Refusal, StartError
from sidecar.memory.contract import MemoryFault, PoolRegion
from sidecar.protocol import RegionOpened
from sidecar.registration import Registration
from sidecar.server import Listener, listen_tcp
from sidecar.spans import Spans
from sidecar.transport.contract import COPIED, STOPPED, PendingCopy, Served
from sidecar.transport.tcp_spans import SpanStream, move, pairs
from sidecar.transport.tcp_wire import DataFault, Pace, Stop, receive, send, set_stall

logger = logging.getLogger(__name__)

MAGIC = b"BATONKV1"
SECRET_BYTES = 32
GRANTED, REFUSED = 0, 1
_ANSWER = struct.Struct("<BQ")
_COUNT = struct.Struct("<I")

MAX_SPANS = 1 << 20
"""Spans a request, 16 MiB of them; a transfer of more sends several requests."""
MAX_STREAMS = 8
"""Connections to one producer: transfers beyond it wait for one."""
MAX_SERVED = 512
"""Connections, and so threads, that read from one pool."""
MAX_REFUSAL_BYTES = 4096


class _Serving:
    """Our pool as peers read it: a listener, and a thread for each connection."""

    def __init__(self, registration: Registration, listen_host: str, host: str, config: SidecarConfig) -> None:
        """Raises Refusal("transport")."""
        self._stall_s, self._gone_s = config.stall_timeout_s, config.peer_gone_s
        try:
            sock = listen_tcp(listen_host, 0, "tcp data port on")
        except StartError as error:
            raise Refusal("transport", str(error)) from error
        self.secret = secrets.token_hex(SECRET_BYTES // 2)
        self.session = f"{host} {sock.getsockname()[1]} {self.secret}"
        self._region = registration.region
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._listener = Listener(sock, self._accepted)

    def _accepted(self, sock: socket.socket) -> None:
        with self._lock:
            if len(self._open) >= MAX_SERVED:
                logger.warning("data_connection_refused limit=%d", MAX_SERVED)
                sock.close()
                return
            thread = threading.Thread(target=self._serve, args=(sock,), name="tcp-serve", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                logger.error("data_connection_refused error=no thread can be started")
                sock.close()
                return
            self._open[sock] = thread

    def close(self) -> list[threading.Thread]:
        """Cut every reader off; the pool may be unmapped when the threads have ended."""
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            return list(self._open.values())

    def _serve(self, sock: socket.socket) -> None:
        try:
            set_stall(sock, self._stall_s)
            hello = receive(sock, len(MAGIC) + SECRET_BYTES)
            if not hmac.compare_digest(hello, MAGIC + self.secret.encode()):
                _refuse(sock, "the data connection's token is wrong")
                return
            send(sock, [memoryview(_ANSWER.pack(GRANTED, 0))])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))  # it may idle
            end_when_gone(sock, self._gone_s)
            stream = SpanStream(self._region)
            while header := receive(sock, _COUNT.size, may_end=True):
                if not self._answer(sock, stream, _COUNT.unpack(header)[0]):
                    return
        except (DataFault, MemoryFault) as fault:
            logger.info("data_connection_ended reason=%s", fault)
        finally:
            with self._lock:
                del self._open[sock]
                sock.close()

    def _answer(self, sock: socket.socket, stream: SpanStream, num_spans: int) -> bool:
        """Stream one request's spans; False if it was refused."""
        if num_spans > MAX_SPANS:
            return _refuse(sock, f"{num_spans} spans were asked for, the limit is {MAX_SPANS}")
        asked = array("Q", receive(sock, 16 * num_spans))
        try:
            num_bytes = stream.total(asked)
        except Refusal as refusal:
            return _refuse(sock, refusal.message)
        stream.send(sock, _ANSWER.pack(GRANTED, num_bytes), asked)
        return True


def _refuse(sock: socket.socket, why: str) -> bool:
    text = why.encode()[:MAX_REFUSAL_BYTES]
    send(sock, [memoryview(_ANSWER.pack(REFUSED, len(text)) + text)])
    return False


class TcpCopy(PendingCopy):
    """One transfer's copy; its thread calls `begin`, `leave` and `end`."""

    def __init__(self, spans: Spans) -> None:
        super().__init__()
        self.spans = spans
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


Connect = Callable[[Callable[[socket.socket], object]], socket.socket]


class TcpMemory:
    """See contract.PeerMemory. A thread and a connection for each copy under way, MAX_STREAMS at most."""

    transport = "tcp"

    def __init__(self, local: PoolRegion, pace: Pace, connect: Connect, first: socket.socket) -> None:
        self._local = local
        self._pace = pace
        self._connect = connect
        self._idle_sockets = [first]
        self._waiting: queue.SimpleQueue[TcpCopy | None] = queue.SimpleQueue()
        self._copies: set[TcpCopy] = set()
        self._threads: list[threading.Thread] = []
        self.broken = ""

    def read(self, spans: Spans) -> PendingCopy:
        if self.broken:
            raise Refusal("transport", self.broken)
        copy = TcpCopy(spans)
        self._copies.add(copy)
        copy.ended.add_done_callback(lambda _: self._copies.discard(copy))
        if len(self._copies) > len(self._threads) < MAX_STREAMS:
            thread = threading.Thread(target=self._work, name="tcp-read", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._waiting.put(copy)
        return copy

    async def close(self) -> None:
        self.broken = self.broken or "its connection to the producer was closed"
        for copy in list(self._copies):
            copy.stop()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        while self._idle_sockets:
            self._idle_sockets.pop().close()
        while self._copies:
            await asyncio.wait([copy.ended for copy in self._copies])

    def _work(self) -> None:
        stream = SpanStream(self._local)
        while (copy := self._waiting.get()) is not None:
            outcome = STOPPED
            try:
                if not copy.stopped.is_set():
                    sock = self._idle_sockets.pop() if self._idle_sockets else self._connect(copy.begin)
                    if self._run(copy, sock, stream):
                        outcome = COPIED
            except (DataFault, MemoryFault) as fault:
                if not copy.stopped.is_set():
                    outcome = self.broken = str(fault)
            except Exception as error:  # the last resort: a copy that never ends would hold its pull for ever
                logger.exception("tcp_read_crashed")
                outcome = self.broken = f"internal error: {error!r}"
            copy.end(outcome)

    def _run(self, copy: TcpCopy, sock: socket.socket, stream: SpanStream) -> bool:
        """Ask and receive; the connection is kept only if it all came. Raises DataFault."""
        complete = False
        try:
            if copy.begin(sock):
                complete = self._transfer(copy, sock, stream)
        finally:
            if copy.leave() and complete:
                self._idle_sockets.append(sock)
            else:
                sock.close()
        return complete

    def _transfer(self, copy: TcpCopy, sock: socket.socket, stream: SpanStream) -> bool:
        spans = copy.spans
        if len(spans) <= MAX_SPANS:
            return self._request(spans, copy, sock, stream)
        parts = (spans.part(first, first + MAX_SPANS) for first in range(0, len(spans), MAX_SPANS))
        return all(self._request(part, copy, sock, stream) for part in parts)

    def _request(self, spans: Spans, copy: TcpCopy, sock: socket.socket, stream: SpanStream) -> bool:
        """As many spans as the producer takes at once; False if stopped meanwhile. Raises DataFault."""
        wanted = pairs(spans.remote, spans.lengths)
        send(sock, [memoryview(_COUNT.pack(len(spans))), memoryview(wanted).cast("B")])
        move(wanted, spans.local)  # while the answer is on its way
        number = _granted(sock)
        if number != spans.num_bytes:
            raise DataFault(f"the producer would send {number} bytes instead of {spans.num_bytes}")
        return stream.receive(sock, wanted, self._pace, copy.stopped)


class TcpTransport:
    """See contract.Transport."""

    name = "tcp"
    needs_same_host = False

    def __init__(self, config: SidecarConfig, host: str) -> None:
        self._listen_host = split_address(config.listen)[0]
        self._host = host
        self._config = config
        self._pace = Pace(config.copy_bytes_per_s)
        self._serving: dict[str, _Serving] = {}

    def registered(self, registration: Registration) -> None:
        """A listener costs nothing: it is made for the first peer that asks."""

    async def serve(self, registration: Registration) -> Served:
        serving = self._serving.get(registration.epoch)
        if serving is None:
            serving = _Serving(registration, self._listen_host, self._host, self._config)
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
            first = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_result)
            raise
        except DataFault as fault:
            raise Refusal("transport", str(fault)) from fault
        return TcpMemory(registration.region, self._pace, connect, first)

    async def retire(self, registration: Registration) -> None:
        serving = self._serving.pop(registration.epoch, None)
        if serving is not None:
            for thread in serving.close():
                await asyncio.to_thread(thread.join)

    def fault(self) -> str:
        return ""


def _connect(
    host: str, port: int, secret: bytes, config: SidecarConfig, begin: Callable[[socket.socket], object]
) -> socket.socket:
    """A data connection, its hello answered; `begin` may shut it down from when it has it. Raises DataFault."""
    try:
        sock = socket.create_connection((host, port), config.connect_timeout_s)
    except (OSError, OverflowError) as error:
        raise DataFault(f"the data port at {host}:{port} cannot be reached: {error}") from error
    try:
        set_stall(sock, config.connect_timeout_s)
        end_when_gone(sock, config.peer_gone_s)
        begin(sock)
        send(sock, [memoryview(MAGIC + secret)])
        _granted(sock)
        set_stall(sock, config.stall_timeout_s)
    except BaseException:
        sock.close()
        raise
    return sock


def _granted(sock: socket.socket) -> int:
    """The bytes that the producer will send. Raises DataFault."""
    status, number = _ANSWER.unpack(receive(sock, _ANSWER.size))
    if status != GRANTED:
        text = receive(sock, min(number, MAX_REFUSAL_BYTES)).decode(errors="replace")
        raise DataFault(f"the producer refused: {text}")
    return int(number)


def _close_result(done: asyncio.Future[socket.socket]) -> None:
    """The one who asked has left."""
    if not done.cancelled() and done.exception() is None:
        done.result().close()

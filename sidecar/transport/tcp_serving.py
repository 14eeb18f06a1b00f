"""The producer's end of data connections: a thread for each streams from the pool. See transport/tcp.py."""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import struct
import threading
from array import array

from sidecar.config import SidecarConfig
from sidecar.connection import end_when_gone
from sidecar.errors import Refusal, StartError
from sidecar.lease_board import LeaseBoard
from sidecar.memory.contract import MemoryFault
from sidecar.registration import Registration
from sidecar.server import Listener, listen_tcp
from sidecar.transport.tcp_spans import SpanStream
from sidecar.transport.tcp_wire import (
    GRANTED,
    HELD,
    LOST,
    MAGIC,
    MAX_SPANS,
    NOT_LEASED,
    REQUEST,
    SECRET_BYTES,
    DataFault,
    answer,
    ending,
    receive,
    refusal,
    send,
    set_stall,
    spare_pacing,
)  # fmt: skip

logger = logging.getLogger(__name__)

MAX_SERVED = 512
"""Connections, and so threads, that read from one pool."""


class Serving:
    """Our pool as peers read it: a listener, and a thread for each connection."""

    def __init__(
        self, registration: Registration, listen_host: str, host: str, config: SidecarConfig, board: LeaseBoard | None
    ) -> None:
        """Raises Refusal("transport")."""
        self._stall_s, self._gone_s = config.stall_timeout_s, config.peer_gone_s
        try:
            sock = listen_tcp(listen_host, 0, "tcp data port on")
        except StartError as error:
            raise Refusal("transport", str(error)) from error
        self.secret = secrets.token_hex(SECRET_BYTES // 2)
        self.session = f"{host} {sock.getsockname()[1]} {self.secret}"
        self._region = registration.region
        self._board = board
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
            spare_pacing(sock)
            hello = receive(sock, len(MAGIC) + SECRET_BYTES)
            if not hmac.compare_digest(hello, MAGIC + self.secret.encode()):
                _refuse(sock, "the data connection's token is wrong")
                return
            send(sock, [memoryview(answer(GRANTED, self._board is not None))])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))  # it may idle
            end_when_gone(sock, self._gone_s)
            stream = SpanStream(self._region)
            while header := receive(sock, REQUEST.size, may_end=True):
                if not self._answer(sock, stream, *REQUEST.unpack(header)):
                    return
        except (DataFault, MemoryFault) as fault:
            logger.info("data_connection_ended reason=%s", fault)
        finally:
            with self._lock:
                del self._open[sock]
                sock.close()

    def _answer(self, sock: socket.socket, stream: SpanStream, num_spans: int, mark: int) -> bool:
        """Stream one request's spans; False if it was refused."""
        if num_spans > MAX_SPANS:
            return _refuse(sock, f"{num_spans} spans were asked for, the limit is {MAX_SPANS}")
        asked = array("Q", receive(sock, 16 * num_spans))
        try:
            num_bytes = stream.total(asked)
        except Refusal as refused:
            return _refuse(sock, refused.message)
        if mark and not self._holds(mark):
            send(sock, [memoryview(answer(NOT_LEASED, 0))])
            return True
        stream.send(sock, answer(GRANTED, num_bytes), asked)
        send(sock, [memoryview(ending(num_bytes, HELD if mark and self._holds(mark) else LOST))])
        return True

    def _holds(self, mark: int) -> bool:
        return self._board is not None and self._board.holds(mark)


def _refuse(sock: socket.socket, why: str) -> bool:
    send(sock, [memoryview(refusal(why))])
    return False

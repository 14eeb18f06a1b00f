"""Taking connections off one socket that all workers listen on.

One socket, not one for each worker (SO_REUSEPORT): what waits on it is anybody's, so nothing is lost with a worker that
dies, and nothing waits for one that is stuck. The kernel wakes all who wait, and whoever is first takes everything; so
a worker that has more connections than another lets that one go first, for a moment.

With TLS one worker takes its connections so, too: those who never end their handshake are bounded here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from proxy.frontend import ClientConnection
from proxy.load_board import CONNECTIONS, BoardRow

log = logging.getLogger(__name__)

STEP_BACK_S = 0.002  # how long the others have; long beside the tens of microseconds that it takes one that is idle
AGAIN_S = 0.1  # after there was no descriptor left
MAX_HANDSHAKES = 1024  # TLS handshakes under way; who has been at his for longest makes room for a newer one
AHEAD_SHIFT = 3  # an eighth more than another has is no reason to step back


class Connections(set[ClientConnection]):
    """Those of clients, their number on the board; `num_beginning` are accepted and not in it yet."""

    def __init__(self, row: BoardRow) -> None:
        super().__init__()
        self.row = row
        self.num_beginning = 0

    @property
    def num(self) -> int:
        return len(self) + self.num_beginning

    def note(self) -> None:
        self.row.note(CONNECTIONS, self.num)

    def add(self, connection: ClientConnection) -> None:
        super().add(connection)
        self.note()

    def discard(self, connection: object) -> None:
        super().discard(connection)
        self.note()


class Acceptor:
    """Each connection gets a protocol of `make_protocol`."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Connections,
        loop: asyncio.AbstractEventLoop,
        tls: ssl.SSLContext | None = None,
        handshake_timeout_s: float = 10.0,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._connections = connections
        self._row = connections.row
        self._loop = loop
        self._tls = tls
        self._handshake_timeout_s = handshake_timeout_s if tls is not None else None
        self._handle: asyncio.TimerHandle | None = None
        self._stepped_back = False
        self._beginning: dict[asyncio.Task[None], None] = {}
        """The oldest first."""
        self._closed = False

    def start(self) -> None:
        self._handle = None
        if not self._closed:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._handle is not None:
                self._handle.cancel()
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def _accept(self) -> None:
        """One connection, then whoever else is woken may have the next."""
        fewest = self._fewest()
        if not self._stepped_back and self._connections.num > fewest + (fewest >> AHEAD_SHIFT):
            self._stepped_back = True
            self._pause(STEP_BACK_S)
            return
        self._stepped_back = False
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another was faster, or the client has left
        except OSError as error:  # out of descriptors: asking again at once would be all we do
            log.error("event=accept_failed reason=%r", str(error))
            self._pause(AGAIN_S)
            return
        self._connections.num_beginning += 1
        self._connections.note()
        task = self._loop.create_task(self._begin(sock))
        self._beginning[task] = None
        task.add_done_callback(self._begun)
        if self._tls is not None and len(self._beginning) > MAX_HANDSHAKES:
            next(iter(self._beginning)).cancel()

    async def _begin(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol, sock, ssl=self._tls, ssl_handshake_timeout=self._handshake_timeout_s
            )
        except OSError:
            sock.close()
        except asyncio.CancelledError:
            sock.close()
            raise

    def _begun(self, task: asyncio.Task[None]) -> None:
        del self._beginning[task]
        self._connections.num_beginning -= 1
        self._connections.note()

    def _fewest(self) -> int:
        row = self._row
        return min((row.read(one, CONNECTIONS) for one in row.awake()), default=1 << 62)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._handle = self._loop.call_later(seconds, self.start)

"""The connections to one instance: taken last used first, made when there is none, swept now and then."""

from __future__ import annotations

import asyncio
import errno
from time import monotonic

from proxy.answer import Answer
from proxy.config import Address, ProxyConfig
from proxy.errors import Failure, UpstreamFailure
from proxy.long_body import Body
from proxy.tls import upstream_context
from proxy.upstream import GATHER_WHOLE, UpstreamConnection

SWEEP_S = 0.25  # between calls of `sweep`
# Nobody says no, so it is not known whether what is open there is alive: as if the time-out had been waited for.
_UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT})


class UpstreamPool:
    """Connections to one instance, last used first. `active` are those with a request on them."""

    def __init__(self, address: Address, config: ProxyConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.config = config
        self.loop = loop
        self.host_line = b"Host: %b\r\n" % str(address).encode("idna" if not address.host.isascii() else "ascii")
        self.tls = upstream_context(config)
        self.server_name = config.upstream_server_name or address.host
        """What the instance's certificate must be for."""
        self.idle: list[UpstreamConnection] = []
        self.active: set[UpstreamConnection] = set()
        self._opening: set[asyncio.Task[UpstreamConnection]] = set()
        self.closed = False
        self.heard_at = 0.0
        """When any connection was last known to have received bytes, to the tick of `sweep`."""
        self.num_breaks = 0
        """Connections that were refused, or that the instance closed while idle: it may be another process since."""

    def take_idle(self) -> UpstreamConnection | None:
        while self.idle:
            connection = self.idle.pop()
            transport = connection.transport
            if transport is not None and not transport.is_closing():
                self.active.add(connection)
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A fresh connection. Raises UpstreamFailure (REFUSED or CONNECT_TIMEOUT): nothing was sent."""
        try:
            async with asyncio.timeout(self.config.connect_timeout_s):
                connection = await (self._opened() if self.tls is None else self._opened_in_peace())
        except TimeoutError:
            self.num_breaks += 1
            raise UpstreamFailure(Failure.CONNECT_TIMEOUT, f"{self.address}: no connection in time") from None
        except OSError as error:
            self.num_breaks += 1
            kind = Failure.CONNECT_TIMEOUT if error.errno in _UNREACHABLE else Failure.REFUSED
            reason = getattr(error, "verify_message", "") or error.strerror or error
            raise UpstreamFailure(kind, f"{self.address}: {reason}") from None
        self.active.add(connection)
        return connection

    async def _opened(self) -> UpstreamConnection:
        host, port = self.address
        _, connection = await self.loop.create_connection(
            lambda: UpstreamConnection(self),
            host,
            port,
            ssl=self.tls,
            server_hostname=self.server_name if self.tls is not None else None,
            ssl_handshake_timeout=self.config.connect_timeout_s if self.tls is not None else None,
        )
        return connection

    async def _opened_in_peace(self) -> UpstreamConnection:
        """uvloop goes on with a TLS handshake that is cancelled, and logs that as a bug. So it is ended, and what comes
        of it kept for the next request."""
        opening = self.loop.create_task(self._opened())
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._keep)
            raise

    def _keep(self, opening: asyncio.Task[UpstreamConnection]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.put_back(opening.result())

    async def call(self, head: bytes, body: Body = b"", *, timeout_s: float) -> Answer:
        """A request on the control path, whole answer. `head` is all of the head but Host, Content-Length and the empty
        line. Raises UpstreamFailure."""
        connection = self.take_idle() or await self.connect()
        lines = b"%b%bContent-Length: %d\r\n\r\n" % (head, self.host_line, len(body))
        try:
            return await connection.send(
                lines, body, first_event_only=GATHER_WHOLE, now=monotonic(), timeout_s=timeout_s
            )
        except (asyncio.CancelledError, UpstreamFailure):
            connection.close()
            raise

    def put_back(self, connection: UpstreamConnection) -> None:
        self.active.discard(connection)
        if self.closed:
            connection.close()
        else:
            connection.idle_since = self.heard_at = monotonic()
            self.idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        self.active.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
            self.num_breaks += 1

    def sweep(self, now: float) -> None:
        """Expire what is overdue, and close what has been idle for long."""
        for connection in list(self.active):
            connection.check_deadline(now, self.config.between_tokens_timeout_s)
        too_old = now - self.config.upstream_keepalive_s
        for connection in [one for one in self.idle if one.idle_since < too_old]:
            self.idle.remove(connection)
            connection.close()

    def instance_is_out(self, silent_since: float) -> None:
        """Give up what has waited since `silent_since`: a stopped engine keeps its connections, and answers nothing.

        Bytes on any connection since then are life, and nothing is given up."""
        if self.heard_since(silent_since):
            return
        for connection in [one for one in self.active if one.sent_at < silent_since]:
            connection.instance_is_out()

    def heard_since(self, when: float) -> bool:
        """Whether bytes came on any connection after `when`, for certain: they are noticed up to a sweep late."""
        now = monotonic()
        for connection in list(self.active):
            if connection.heard:
                self.heard_at = now
        return self.heard_at - SWEEP_S > when

    def close(self, *, idle_only: bool = False) -> None:
        self.closed = not idle_only
        for connection in [*self.idle, *(() if idle_only else self.active)]:
            connection.close()
        self.idle.clear()

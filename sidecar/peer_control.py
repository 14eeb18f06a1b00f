"""The consumer's side of a connection to a producer's sidecar: dial, hello, calls and their answers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sidecar import protocol
from sidecar.connection import FrameConnection, same_user
from sidecar.errors import FrameError, PeerLost, Refusal
from sidecar.protocol import (
    PEER_FRAME_BYTES,
    CallRefused,
    Computed,
    Message,
    PeerHello,
    PeerWelcome,
    Refused,
    RegionOpened,
    Withdrawn,
    decode,
    encode,
)  # fmt: skip

Answer = asyncio.Future[Message]
Address = tuple[str, int] | str
"""(host, port), or the name of a unix socket; a leading NUL makes it abstract."""


@dataclass(slots=True)
class _Call:
    answer: Answer
    since: float


class PeerControl:
    """An open connection after its welcome. `on_closed(why)` is called once when it ends."""

    def __init__(self, sock: socket.socket, hello: PeerHello, gone_s: float = 0.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, _Call] = {}
        self._next_call_id = 1
        self._welcome: asyncio.Future[PeerWelcome] = self._loop.create_future()
        self._connection = FrameConnection(
            sock, max_frame_bytes=PEER_FRAME_BYTES, on_frame=self._take, on_closed=self._closed, gone_s=gone_s
        )
        self.on_closed: Callable[[str], None] = lambda why: None
        self._fd: int | None = None
        self._board_fd: int | None = None
        self.followers: dict[str, Callable[[Computed | Withdrawn], None]] = {}
        """Who is told of a lease that is still computed, by its transfer id."""
        self._connection.send(encode(hello))

    @property
    def closed(self) -> bool:
        return self._connection.closed

    @property
    def waiting_since(self) -> float | None:
        """Loop time of the oldest call without an answer."""
        first = next(iter(self._calls.values()), None)
        return first.since if first else None

    async def welcome(self) -> PeerWelcome:
        """The producer's answer to our hello. Raises Refusal."""
        return await self._welcome

    def call(self, make: Callable[[int], Message]) -> Answer:
        """Send `make(call_id)`; the future holds the answer, Refusal or PeerLost."""
        answer: Answer = self._loop.create_future()
        answer.add_done_callback(_retrieve)
        if self._connection.closed:
            answer.set_exception(PeerLost("the connection to the producer's sidecar has ended"))
            return answer
        call_id, self._next_call_id = self._next_call_id, self._next_call_id + 1
        self._calls[call_id] = _Call(answer, self._loop.time())
        self._connection.send(encode(make(call_id)))
        return answer

    def take_fd(self) -> int | None:
        """The descriptor that came with the last RegionOpened, now the caller's."""
        fd, self._fd = self._fd, None
        return fd

    def take_board_fd(self) -> int | None:
        """That of the lease board, likewise."""
        fd, self._board_fd = self._board_fd, None
        return fd

    def close(self, why: str) -> None:
        """End it; open calls fail with PeerLost. Idempotent."""
        self._connection.close(why)

    def _take(self, frame: bytes) -> None:
        message = decode(protocol.to_consumer, frame)
        if not self._welcome.done():
            if isinstance(message, PeerWelcome):
                self._welcome.set_result(message)
            elif isinstance(message, Refused):
                self._welcome.set_exception(Refusal(message.reason, message.message))
                self._welcome.exception()
            else:
                raise FrameError("the producer's sidecar did not begin with a welcome")
            return
        if isinstance(message, PeerWelcome | Refused):
            raise FrameError("a second welcome")
        if isinstance(message, Computed | Withdrawn):
            if (follower := self.followers.get(message.transfer_id)) is not None:
                follower(message)
            return
        if isinstance(message, RegionOpened) and message.with_descriptor:
            self._close_fds()
            self._fd = self._connection.take_fd()
            if message.with_board:
                self._board_fd = self._connection.take_fd()
        call = self._calls.pop(message.call_id, None)
        if call is None or call.answer.done():
            return
        if isinstance(message, CallRefused):
            call.answer.set_exception(Refusal(message.reason, message.message))
        else:
            call.answer.set_result(message)

    def _closed(self, why: str) -> None:
        lost = PeerLost(f"the connection to the producer's sidecar ended: {why}")
        if not self._welcome.done():
            self._welcome.set_exception(lost)
            self._welcome.exception()
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(lost)
        self._calls.clear()
        self._close_fds()
        self.on_closed(why)

    def _close_fds(self) -> None:
        for fd in (self.take_fd(), self.take_board_fd()):
            if fd is not None:
                os.close(fd)


async def dial(
    address: Address, hello: PeerHello, timeout_s: float, gone_s: float = 0.0
) -> tuple[PeerControl, PeerWelcome]:
    """Connect and exchange hellos within `timeout_s`; `gone_s` as in FrameConnection.

    Raises PeerLost, or the producer's Refusal.
    """
    try:
        async with asyncio.timeout(timeout_s):
            control = PeerControl(await _connect(address), hello, gone_s)
            try:
                return control, await control.welcome()
            except BaseException:
                control.close("the handshake failed")
                raise
    except TimeoutError as error:
        raise PeerLost(f"{_name(address)} did not answer within {timeout_s:g} s") from error
    except OSError as error:
        raise PeerLost(f"{_name(address)} cannot be reached: {error.strerror or error}") from error


async def _connect(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    if isinstance(address, str):
        return await _connect_one(loop, socket.AF_UNIX, address)
    host, port = address
    if not 0 < port < 65536:
        raise PeerLost(f"{port} is not a port")
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise PeerLost(f"{host!r} is not a host name") from error
    failure: OSError | None = None
    for family, _, _, _, target in found:
        try:
            return await _connect_one(loop, family, target)
        except OSError as error:
            failure = error
    raise failure or PeerLost(f"{host!r} has no address")


async def _connect_one(loop: asyncio.AbstractEventLoop, family: int, target: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await loop.sock_connect(sock, target)
        if family == socket.AF_UNIX and not same_user(sock):
            raise PeerLost("the process behind the peer socket runs as another user")
    except BaseException:
        sock.close()
        raise
    return sock


def _name(address: Address) -> str:
    return "the peer socket" if isinstance(address, str) else f"{address[0]}:{address[1]}"


def _retrieve(answer: Answer) -> None:
    """Mark a failure as seen: a caller that was interrupted no longer looks."""
    if not answer.cancelled():
        answer.exception()

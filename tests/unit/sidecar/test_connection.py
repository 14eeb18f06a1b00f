from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from sidecar import connection
from sidecar.connection import FrameConnection, end_when_gone, same_user
from sidecar.errors import FrameError
from sidecar.framing import encode_frame


class Side:
    """One FrameConnection over a socket pair, and what came over it."""

    def __init__(self, *, lingers: bool = False, max_frame_bytes: int = 1 << 20) -> None:
        ours, self.other = socket.socketpair()
        self.other.setblocking(False)
        self.frames: list[bytes] = []
        self.closed: list[str] = []
        self.changed = asyncio.Event()
        self.on_frame: Callable[[bytes], None] = lambda frame: None
        self.connection = FrameConnection(
            ours, max_frame_bytes=max_frame_bytes, on_frame=self._frame, on_closed=self._closed, lingers=lingers
        )

    def _frame(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.changed.set()
        self.on_frame(frame)

    def _closed(self, why: str) -> None:
        self.closed.append(why)
        self.changed.set()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                self.changed.clear()
                await self.changed.wait()


async def receive(sock: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        chunk = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, num_bytes), 10)
        if not chunk:
            break
        received += chunk
    return received


async def test_frames_both_ways() -> None:
    side = Side()
    side.connection.send(b"out")
    assert await receive(side.other, 7) == encode_frame(b"out")
    side.other.send(encode_frame(b"one") + encode_frame(b"two")[:2])
    side.other.send(encode_frame(b"two")[2:])
    await side.until(lambda: len(side.frames) == 2)
    assert side.frames == [b"one", b"two"]
    side.other.close()
    await side.until(lambda: bool(side.closed))
    side.connection.close("again")
    side.connection.send(b"nobody hears")
    assert side.closed == ["the other end closed the connection"]


async def test_more_than_the_socket_holds_is_kept_and_sent_in_order() -> None:
    side = Side()
    payloads = [bytes([number]) * 300_000 for number in range(10)]
    for payload in payloads:
        side.connection.send(payload)
    expected = b"".join(encode_frame(payload) for payload in payloads)
    assert await receive(side.other, len(expected)) == expected
    side.connection.close("done")
    side.other.close()


async def test_an_end_that_reads_nothing_is_given_up() -> None:
    side = Side()
    for _ in range(1 + connection.MAX_UNSENT_BYTES // (8 << 20)):
        side.connection.send(bytes(8 << 20))
    await side.until(lambda: bool(side.closed))
    assert "lie unread" in side.closed[0]
    side.other.close()


async def test_a_descriptor_comes_with_its_frame_and_strays_are_closed() -> None:
    side = Side()
    fd = os.memfd_create("passed")
    taken: list[int] = []
    side.on_frame = lambda frame: taken.append(side.connection.take_fd()) if frame == b"take" else None
    socket.send_fds(side.other, [encode_frame(b"take")], [fd])
    await side.until(lambda: len(side.frames) == 1)
    assert os.fstat(taken[0]).st_ino == os.fstat(fd).st_ino
    open_before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(side.other, [encode_frame(b"leave")], [fd, fd])
    await side.until(lambda: len(side.frames) == 2)
    assert len(os.listdir("/proc/self/fd")) == open_before
    for number in (fd, taken[0]):
        os.close(number)
    side.connection.close("done")
    side.other.close()


async def test_sending_a_descriptor() -> None:
    side = Side()
    fd = os.memfd_create("passed")
    side.connection.send(b"here", [fd])
    chunk, fds, _, _ = socket.recv_fds(side.other, 100, 4)
    assert chunk == encode_frame(b"here") and os.fstat(fds[0]).st_ino == os.fstat(fd).st_ino
    for number in (fd, fds[0]):
        os.close(number)
    side.connection.close("done")
    side.other.close()


async def test_bad_frames_and_crashing_handlers_close_the_connection() -> None:
    def refuse(frame: bytes) -> None:
        raise FrameError("nonsense")

    def crash(frame: bytes) -> None:
        raise KeyError("bug")

    for handler, said in ((refuse, "bad frame: nonsense"), (crash, "internal error: KeyError('bug')")):
        side = Side()
        side.on_frame = handler
        side.other.send(encode_frame(b"x") * 2)
        await side.until(lambda side=side: bool(side.closed))  # type: ignore[misc]
        assert side.closed == [said] and len(side.frames) == 1
        side.other.close()
    side = Side(max_frame_bytes=3)
    side.other.send(encode_frame(b"1234"))
    await side.until(lambda: bool(side.closed))
    assert "over the limit" in side.closed[0]
    side.other.close()


async def test_a_lingering_connection_shows_its_end_only_when_finished() -> None:
    side = Side(lingers=True)
    duplicate = os.dup(side.connection.fileno())
    side.connection.close("stopping")
    await side.until(lambda: bool(side.closed))
    try:
        side.other.recv(1)
        raise AssertionError("the other end saw the end too early")
    except BlockingIOError:
        pass
    side.connection.finish()
    assert await receive(side.other, 1) == b""  # although a duplicate is open
    os.close(duplicate)
    side.other.close()


def test_same_user() -> None:
    here, there = socket.socketpair()
    assert same_user(here)
    here.close()
    there.close()


def test_a_host_that_answers_nothing_is_noticed_in_time() -> None:
    with socket.socket() as sock:
        end_when_gone(sock, 30.0)
        probes = [sock.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert probes[0] + 3 * probes[1] <= 30
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000

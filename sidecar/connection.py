"""Frames over a connected socket on the event loop, with descriptors beside them on unix sockets.

asyncio's streams cannot receive descriptors and cost a task per connection; this is a reader callback, a write
buffer and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from sidecar.errors import FrameError
from sidecar.framing import FrameDecoder, encode_frame

logger = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
"""Below malloc's threshold for mapping memory anew at each read."""
MAX_FDS = 4
"""Descriptors that may wait for the frame they belong to; one message carries one."""
MAX_UNSENT_BYTES = 64 << 20
"""An end that leaves this much unread is given up."""

_UCRED = struct.Struct("3i")
_INT = struct.Struct("i")
_FDS_SPACE = socket.CMSG_SPACE(MAX_FDS * _INT.size)


class FrameConnection:
    """One connected non-blocking socket. `on_frame` is called for each frame, `on_closed` once, from the loop."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        max_frame_bytes: int,
        on_frame: Callable[[bytes], None],
        on_closed: Callable[[str], None],
        lingers: bool = False,
        gone_s: float = 0.0,
    ) -> None:
        """With `lingers` the other end sees the end only after `finish`, which the owner calls once.

        A TCP connection ends when the other host has not answered for `gone_s`; 0: as the system has it.
        """
        self._lingers = lingers
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder(max_frame_bytes)
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._unix = sock.family == socket.AF_UNIX
        self._unsent = bytearray()
        self._fds: deque[int] = deque()
        self.closed = False
        sock.setblocking(False)
        if not self._unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if gone_s:
                end_when_gone(sock, gone_s)
        self._fileno = sock.fileno()
        self._loop.add_reader(self._fileno, self._readable)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._fileno

    def same_process(self) -> bool:
        """Whether both ends of this unix socket are in this very process."""
        return self._unix and peer_pid(self._sock) == os.getpid()

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Queue one frame; `fds` go with its first byte and stay the caller's. Does nothing once closed."""
        if self.closed:
            return
        frame = encode_frame(payload)
        if self._unsent:
            self._unsent += frame
        else:
            try:
                sent = socket.send_fds(self._sock, [frame], list(fds)) if fds else self._sock.send(frame)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self.close(f"sending failed: {error.strerror}")
                return
            if sent == len(frame):
                return
            if sent == 0 and fds:
                self.close("the other end does not read its descriptors")
                return
            self._unsent += memoryview(frame)[sent:]
            self._loop.add_writer(self._fileno, self._writable)
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self.close(f"{len(self._unsent)} bytes lie unread at the other end")

    def send_at_once(self, payload: bytes, fds: Sequence[int]) -> bool:
        """Send one frame with `fds`, or nothing, and say False, where the other end is slow to read."""
        if self.closed or self._unsent:
            return False
        frame = encode_frame(payload)
        try:
            sent = socket.send_fds(self._sock, [frame], list(fds))
        except OSError:
            return False  # for good: the next read or send tells
        if sent < len(frame):
            self._unsent += memoryview(frame)[sent:]
            self._loop.add_writer(self._fileno, self._writable)
        return True

    def take_fd(self) -> int:
        """The descriptor that came with the frame being handled, now the caller's. Raises FrameError without one."""
        if not self._fds:
            raise FrameError("a descriptor was expected with this message")
        return self._fds.popleft()

    def close(self, why: str) -> None:
        """Close now; `on_closed(why)` follows from the loop. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fileno)
        self._loop.remove_writer(self._fileno)
        self._close_fds()
        if not self._lingers:
            self.finish()
        self._loop.call_soon(self._on_closed, why)

    def finish(self) -> None:
        """Let the other end see that the connection has ended. Idempotent."""
        with contextlib.suppress(OSError):
            # A child process may hold a duplicate: closing alone would not end it.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _readable(self) -> None:
        try:
            if self._unix:
                chunk, ancillary, flags, _ = self._sock.recvmsg(READ_BYTES, _FDS_SPACE, socket.MSG_CMSG_CLOEXEC)
                if (ancillary or flags & socket.MSG_CTRUNC) and not self._keep_fds(ancillary, flags):
                    return
            else:
                chunk = self._sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"receiving failed: {error.strerror}")
            return
        if not chunk:
            self.close("the other end closed the connection")
            return
        self._take(chunk)

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> bool:
        """Queue received descriptors; False if there are too many, with the connection closed."""
        for level, kind, packed in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(packed) - len(packed) % _INT.size
                self._fds.extend(number for (number,) in _INT.iter_unpack(packed[:whole]))
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            self.close("too many descriptors")
            return False
        return True

    def _take(self, chunk: bytes) -> None:
        try:
            for frame in self._decoder.feed(chunk):
                if self.closed:
                    return
                self._on_frame(frame)
        except FrameError as error:
            logger.warning("bad_frame error=%s", error)
            self.close(f"bad frame: {error}")
        except Exception as error:  # the last resort: an answer that never comes would hang the other end
            logger.exception("frame_handler_crashed")
            self.close(f"internal error: {error!r}")
        if not self._decoder.mid_frame:
            self._close_fds()

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.popleft())

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"sending failed: {error.strerror}")
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._fileno)


def end_when_gone(sock: socket.socket, seconds: float) -> None:
    """Let a TCP connection end, idle or not, when the other host has not answered for about `seconds`."""
    probe_s = max(1, int(seconds / 4))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket runs as our user (or as root)."""
    _, uid, _ = _credentials(sock)
    return uid in (0, os.getuid())


def peer_pid(sock: socket.socket) -> int:
    """Of the process that made the other end of a unix socket."""
    return _credentials(sock)[0]


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """pid, uid, gid."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid

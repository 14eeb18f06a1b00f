"""What comes from the sidecar over an engine's connection: frames, and descriptors beside some. Blocking."""

from __future__ import annotations

import array
import os
import socket
from collections import deque

from sidecar.errors import FrameError
from sidecar.framing import FrameDecoder
from sidecar.greeting import READ_BYTES

_FDS_SPACE = socket.CMSG_SPACE(8 * array.array("i").itemsize)


class Incoming:
    """Used by one thread; the socket is its maker's."""

    def __init__(self, sock: socket.socket, decoder: FrameDecoder) -> None:
        self._sock = sock
        self._decoder = decoder
        self._fds: deque[int] = deque()
        self._short_of_fds = False

    def frames(self) -> list[bytes] | None:
        """Those that are whole after the next read; None at the stream's end. Raises OSError or FrameError."""
        chunk, ancillary, flags, _ = self._sock.recvmsg(READ_BYTES, _FDS_SPACE, socket.MSG_CMSG_CLOEXEC)
        for level, kind, packed in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(packed[: len(packed) - len(packed) % numbers.itemsize])
                self._fds.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            self._short_of_fds = True
        if self._short_of_fds:
            self.close()
        return self._decoder.feed(chunk) if chunk else None

    def take_fds(self, num_fds: int) -> tuple[int, ...]:
        """The descriptors that came with the frame being handled, now the caller's. Raises FrameError.

        Empty, for good, once this process could not take one in: to which frame the others belong is not known then.
        """
        if self._short_of_fds:
            return ()
        if len(self._fds) < num_fds:
            raise FrameError("descriptors were expected with this message")
        return tuple(self._fds.popleft() for _ in range(num_fds))

    def await_end(self) -> None:
        """Read on, for nothing, until the stream ends. Raises OSError."""
        while self._sock.recv(READ_BYTES):
            pass

    def close(self) -> None:
        """Close the descriptors that nobody has taken. Idempotent."""
        while self._fds:
            os.close(self._fds.popleft())

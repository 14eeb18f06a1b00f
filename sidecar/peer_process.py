"""The process at the other end of a unix socket, to be killed if it hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading


class PeerProcess:
    """Named by a descriptor, which can never come to mean another process. Thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._lock = threading.Lock()
        self._pidfd = _open_peer(sock)

    def kill(self) -> None:
        """Does nothing if the process can't be named from here (another pid namespace) or signalled."""
        with self._lock:
            if self._pidfd is not None:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        with self._lock:
            pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)


def _open_peer(sock: socket.socket) -> int | None:
    """None if unknown."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = int(struct.unpack("3i", credentials)[0])
    if pid <= 0 or pid == os.getpid():
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None

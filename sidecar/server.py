"""Listening sockets and who is connected to them: engines on a unix socket, other sidecars on TCP and a peer socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from sidecar.connection import same_user
from sidecar.errors import StartError

logger = logging.getLogger(__name__)

BACKLOG = 1024
ACCEPT_PAUSE_S = 0.1
"""Wait after running out of descriptors, instead of spinning on a listener that stays readable."""
MAX_UNIX_PATH_BYTES = 107


class Listener:
    """One listening socket; `on_accept` gets each connection, non-blocking and with close-on-exec."""

    def __init__(self, sock: socket.socket, on_accept: Callable[[socket.socket], None]) -> None:
        self._sock = sock
        self._on_accept = on_accept
        self._loop = asyncio.get_running_loop()
        self._closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Accept nobody any more. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            logger.error("accept_failed error=%s", error.strerror)
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._loop.remove_reader(self._sock.fileno())
                self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
            return
        connection.setblocking(False)
        if connection.family == socket.AF_UNIX and not same_user(connection):
            logger.warning("connection_refused reason=another_user")
            connection.close()
            return
        self._on_accept(connection)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._accept)


class EngineSocket:
    """The unix socket at `path`: a stale file is replaced, a live one refused; removed again by `remove`."""

    def __init__(self, path: str) -> None:
        """Bind and listen. Raises StartError."""
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise StartError(f"--socket {path}: a unix socket's path has at most {MAX_UNIX_PATH_BYTES} bytes")
        self._path = Path(path)
        self._make_room()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self.sock.bind(path)
            self.sock.listen(BACKLOG)
        except OSError as error:
            self.sock.close()
            raise StartError(f"--socket {path}: {error.strerror}; give a path in a writable directory") from error
        finally:
            os.umask(mask)
        self._inode = self._path.stat().st_ino

    def remove(self, *, with_directory: bool = False) -> None:
        """Unlink the file, unless somebody has put another in its place; and its directory, if that is empty now."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        if with_directory:
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()

    def _make_room(self) -> None:
        try:
            mode = self._path.stat().st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            raise StartError(f"--socket {self._path}: {error.strerror}") from error
        if not stat.S_ISSOCK(mode):
            raise StartError(f"--socket {self._path}: a file lies there; remove it or take another path")
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        probe.settimeout(1.0)
        try:
            probe.connect(str(self._path))
        except ConnectionRefusedError:
            logger.info("stale_socket_replaced path=%s", self._path)
            self._path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise StartError(f"--socket {self._path}: {error.strerror or error}") from error
        finally:
            probe.close()
        raise StartError(f"--socket {self._path}: another sidecar is listening there; stop it or take another path")


def listen_tcp(host: str, port: int, flag: str) -> socket.socket:
    """A TCP listener. Raises StartError naming `flag`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartError(f"{flag} {host}:{port}: {error.strerror}; give an address of this machine") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        taken = error.errno == errno.EADDRINUSE
        remedy = "take another port, or 0 for any" if taken else "give an address of this machine"
        raise StartError(f"{flag} {host}:{port}: {error.strerror}; {remedy}") from error
    return sock


def listen_abstract(name: str) -> socket.socket:
    """A listener on an abstract unix socket: no file, and it ends with the process. Raises StartError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind("\0" + name)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise StartError(f"the peer socket cannot be made: {error.strerror}") from error
    return sock

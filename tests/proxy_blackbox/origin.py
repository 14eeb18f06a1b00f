"""An instance that does what a test's function says with each request, byte for byte: for the routes that are passed
on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.proxy_blackbox.harness import HOST


@dataclass
class Asked:
    """One request: its head, and the connection with whatever of the body has not been read."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    rest: bytes
    sock: socket.socket

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def receive(self) -> bytes:
        """The next bytes of the body, as they are framed; empty at the end of the connection."""
        if self.rest:
            found, self.rest = self.rest, b""
            return found
        return self.sock.recv(65536)

    def until(self, end: bytes) -> bytes:
        held = b""
        while not held.endswith(end):
            more = self.receive()
            assert more, held
            held += more
        return held


Serve = Callable[[Asked], None]


def answer(status: int, body: bytes, *lines: str) -> bytes:
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


@contextmanager
def origin(serve: Serve) -> Iterator[int]:
    """Its port. It is well (`/health`) and lists models; `serve` gets every other request."""
    listener = socket.create_server((HOST, 0))
    listener.settimeout(0.1)
    over = threading.Event()
    threads: list[threading.Thread] = []

    def one(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(20)
            head = b""
            while b"\r\n\r\n" not in head:
                more = sock.recv(65536)
                if not more:
                    return
                head += more
            lines, _, rest = head.partition(b"\r\n\r\n")
            first, *fields = lines.decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ")
            pairs = [(name, value.strip()) for name, _, value in (field.partition(":") for field in fields)]
            if target in ("/health", "/v1/models", "/metrics"):
                sock.sendall(answer(200, b"{}", "Connection: close"))
                return
            serve(Asked(method, target, pairs, rest, sock))

    def accept() -> None:
        while not over.is_set():
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=one, args=(sock,), daemon=True))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        over.set()
        acceptor.join()
        listener.close()
        for thread in threads:
            thread.join(5)

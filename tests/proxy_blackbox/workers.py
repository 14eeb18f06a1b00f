"""A proxy's worker processes, and connections that are in one or the other."""

from __future__ import annotations

import json
import socket
from collections import Counter
from contextlib import ExitStack, closing

import psutil

from tests.proxy_blackbox.harness import (
    CHAT,
    HOST,
    Answer,
    Engines,
    Proxy,
    body_of,
    eventually,
    raw_post,
    read_answer,
    request,
)


def workers(proxy: Proxy) -> list[psutil.Process]:
    return sorted(psutil.Process(proxy.process.popen.pid).children(), key=lambda one: one.pid)


def worker_of(proxy: Proxy, sock: socket.socket) -> int:
    """The process that has the other end of a connection."""
    own = sock.getsockname()[1]
    found: list[int] = []

    def missing() -> object:
        found[:] = [
            one.pid
            for one in workers(proxy)
            if any(c.raddr and c.raddr.port == own and c.laddr.port == proxy.port for c in one.net_connections("tcp"))
        ]
        return not found

    eventually(missing, "nobody has the connection")
    return found[0]


class Clients(ExitStack):
    """Connections that stay open, some in each worker."""

    def __init__(self, proxy: Proxy, num_each: int = 1) -> None:
        super().__init__()
        self.of: dict[int, list[socket.socket]] = {one.pid: [] for one in workers(proxy)}
        for _ in range(200):
            if all(len(some) >= num_each for some in self.of.values()):
                return
            sock = self.enter_context(closing(socket.create_connection((HOST, proxy.port), timeout=20)))
            self.of[worker_of(proxy, sock)].append(sock)
        raise AssertionError(f"one worker takes all: { {pid: len(some) for pid, some in self.of.items()} }")

    @property
    def each(self) -> list[socket.socket]:
        """One in each worker."""
        return [some[0] for some in self.of.values()]


def ask(sock: socket.socket, **more: object) -> Answer:
    sock.sendall(raw_post(CHAT, json.dumps(body_of(CHAT, **more)).encode()))  # type: ignore[arg-type]
    return read_answer(sock)


def begin(sock: socket.socket, num_tokens: int = 90_000) -> None:
    """A stream that goes on; returns once its first event is there."""
    fields = body_of(CHAT, num_tokens=num_tokens, stream=True, mock={"interval_s": 0.02})
    sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
    assert b"data:" in (sock.recv(1 << 16) + sock.recv(1 << 16))


def sample(proxy: Proxy, name: str, **labels: str) -> float:
    """The sum over all samples of `name` with these labels."""
    found = 0.0
    for line in proxy.get("/metrics").body.decode().splitlines():
        if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            found += float(line.rsplit(" ", 1)[1])
    return found


def served(engines: Engines) -> Counter[int]:
    by_port = request(engines.control_port, "GET", "/mock/requests").json
    return Counter({port: len(by_port[str(port)]) for port in engines.decode})

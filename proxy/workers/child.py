"""A worker process as its parent sees it."""

from __future__ import annotations

import socket

from proxy.workers.frames import Decoder


class Child:
    """`pid` is 0 while there is no process; then `start_at` says when there is to be one again."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.sock: socket.socket | None = None
        self.decoder = Decoder()
        self.outgoing = bytearray()
        self.owes: set[tuple[int, int]] = set()
        """Answers that others wait for: who asked, and the id of the question."""
        self.is_ready = False
        self.reason = ""
        self.since = 0.0
        self.start_at = 0.0
        self.back_off_s = 0.0

    def began(self, pid: int, sock: socket.socket, now: float) -> None:
        sock.setblocking(False)
        self.pid, self.sock, self.since = pid, sock, now
        self.decoder = Decoder()

    def ended(self) -> None:
        if self.sock is not None:
            self.sock.close()
        self.pid, self.sock, self.is_ready, self.reason = 0, None, False, ""
        self.outgoing.clear()
        self.owes.clear()

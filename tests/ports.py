"""Ports for the processes of a test."""

from __future__ import annotations

import socket


def free_port() -> int:
    """On 127.0.0.1, where nobody listens, until this process ends: bound without listening it is given to nobody who
    asks for any, and is refused to none who asks for it by number, with SO_REUSEADDR as servers do."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    port: int = probe.getsockname()[1]
    probe.detach()
    return port

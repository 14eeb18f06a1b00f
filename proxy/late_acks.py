"""Acknowledgements that ride on what is sent, or are joined, where the system can do that."""

from __future__ import annotations

import socket

_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux only


def acknowledge_late(connection: socket.socket | None) -> None:
    """A packet for every token read would be a sixth of what a paced stream costs. To be said again now and then: the
    kernel forgets it when it has waited in vain (tcp(7))."""
    if _QUICKACK is not None and connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 0)

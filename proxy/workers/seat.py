"""What a worker process is given by its parent."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from proxy.load_board import BoardRow
from proxy.prefix_board import PrefixBoard


@dataclass(frozen=True, slots=True)
class Seat:
    """`channel` leads to the parent, `prefixes` has a table for each role; `replaces` says that another sat here, and
    the rest may know more than the configuration says."""

    worker: int
    listeners: list[socket.socket]
    channel: socket.socket
    row: BoardRow
    prefixes: dict[str, PrefixBoard]
    replaces: bool

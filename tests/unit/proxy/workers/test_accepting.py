"""Two acceptors on one socket, in one loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from proxy.drain import wait_until
from proxy.load_board import BEAT, CONNECTIONS, SERVING, LoadBoard
from proxy.workers.accepting import Acceptor, Connections


class Connection(asyncio.Protocol):
    def __init__(self, those: Connections) -> None:
        self.those = those

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.those.add(self)  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self.those.discard(self)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen(128)
        made.setblocking(False)
        yield made


async def connected(listener: socket.socket, num: int) -> list[asyncio.StreamWriter]:
    return [(await asyncio.open_connection(*listener.getsockname()))[1] for _ in range(num)]


async def close(writers: list[asyncio.StreamWriter]) -> None:
    for one in writers:
        one.close()
        await one.wait_closed()


async def test_connections_go_where_there_are_fewest(listener: socket.socket) -> None:
    board, loop = LoadBoard(2), asyncio.get_running_loop()
    rows = [board.row(0), board.row(1)]
    those = [Connections(row) for row in rows]
    acceptors = []
    for row, mine in zip(rows, those, strict=True):
        row.note(SERVING, 1)
        row.beat()
        acceptors.append(Acceptor(listener.dup(), lambda mine=mine: Connection(mine), mine, row, loop))  # type: ignore[misc]
    for one in acceptors:
        one.start()
    writers: list[asyncio.StreamWriter] = []

    def noted() -> list[int]:
        return [row.read(row.worker, CONNECTIONS) for row in rows]

    try:
        writers += await connected(listener, 12)
        assert await wait_until(lambda: len(those[0]) + len(those[1]) == 12, 20)
        assert min(len(those[0]), len(those[1])) >= 3
        assert await wait_until(lambda: noted() == [len(mine) for mine in those], 20)

        rows[1].note(BEAT, 1)  # it does not stir: nobody waits for it
        acceptors[1].close()
        before = len(those[0])
        writers += await connected(listener, 6)
        assert await wait_until(lambda: len(those[0]) == before + 6, 20)

        rows[1].beat()  # it stirs and takes none: it is waited for, a moment
        writers += await connected(listener, 3)
        assert await wait_until(lambda: len(those[0]) == before + 9, 20)
        await close(writers)
        assert await wait_until(lambda: not those[0] and not those[1], 20)
        assert await wait_until(lambda: noted() == [0, 0], 20)
    finally:
        for one in acceptors:
            one.close()
            one.close()
        await close(writers)

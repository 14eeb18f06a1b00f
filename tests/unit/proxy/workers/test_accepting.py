"""Two acceptors on one socket, in one loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.drain import wait_until
from proxy.load_board import BEAT, CONNECTIONS, SERVING, LoadBoard
from proxy.workers import accepting
from proxy.workers.accepting import Acceptor, Connections
from tests.proxy_blackbox.tls import Authority


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
        acceptors.append(Acceptor(listener.dup(), lambda mine=mine: Connection(mine), mine, loop))  # type: ignore[misc]
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


async def test_those_who_never_end_their_handshake_make_room_for_others(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accepting, "MAX_HANDSHAKES", 5)
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("proxy", "IP:127.0.0.1"))
    loop, those = asyncio.get_running_loop(), Connections(LoadBoard(1).row(0))
    acceptor = Acceptor(listener.dup(), lambda: Connection(those), those, loop, context, handshake_timeout_s=60)
    acceptor.start()
    silent = [await asyncio.open_connection(*listener.getsockname()) for _ in range(12)]
    try:
        assert await wait_until(lambda: sum(reader.at_eof() for reader, _ in silent) == 7, 20)
        assert [reader.at_eof() for reader, _ in silent] == [True] * 7 + [False] * 5
        trusting = ssl.create_default_context(cafile=authority.ca)
        _, writer = await asyncio.open_connection(*listener.getsockname(), ssl=trusting)
        assert await wait_until(lambda: (len(those), those.num) == (1, 5), 20)
        await close([writer])
    finally:
        acceptor.close()
        for _, writer in silent:
            writer.close()
    assert await wait_until(lambda: those.num == 0, 20)

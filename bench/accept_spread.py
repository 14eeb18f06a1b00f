"""How the connections of one port spread over worker processes, by three ways of accepting them.

    python -m bench.accept_spread

`reuseport` is a socket for each worker (the kernel hashes), `shared` one socket in every worker's loop (whoever is
first), `stepping back` is what `proxy/workers/accepting.py` does. Prints the share of the busiest of two workers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import uvloop

from proxy.load_board import CONNECTIONS, SERVING, BoardRow, LoadBoard
from proxy.workers.accepting import Acceptor, Connections

WAYS = ("reuseport", "shared", "stepping back")
CASES = ((4, 0.01), (8, 0.01), (8, 0.0), (32, 0.0), (256, 0.0))  # connections, seconds between them
NUM_WORKERS = 2
NUM_ROUNDS = 8
SETTLE_S = 0.2


class Connection(asyncio.Protocol):
    def __init__(self, those: Connections) -> None:
        self.those = those

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.those.add(self)  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self.those.discard(self)


async def work(way: str, listener: socket.socket, row: BoardRow) -> None:
    loop = asyncio.get_running_loop()
    those = Connections(row)
    row.note(SERVING, 1)
    if way == "stepping back":
        Acceptor(listener, lambda: Connection(those), those, row, loop).start()
    else:
        await loop.create_server(lambda: Connection(those), sock=listener, backlog=4096)
    while True:
        row.beat()
        await asyncio.sleep(0.2)


def listening(way: str) -> list[socket.socket]:
    made: list[socket.socket] = []
    for _ in range(NUM_WORKERS if way == "reuseport" else 1):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(made[0].getsockname() if made else ("127.0.0.1", 0))
        one.listen(4096)
        one.setblocking(False)
        made.append(one)
    return made


@contextmanager
def workers(way: str) -> Iterator[tuple[tuple[str, int], LoadBoard]]:
    board, listeners, pids = LoadBoard(NUM_WORKERS), listening(way), []
    for number in range(NUM_WORKERS):
        pid = os.fork()
        if not pid:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(work(way, listeners[number % len(listeners)], board.row(number)))
        pids.append(pid)
    try:
        while board.missing():
            time.sleep(0.02)
        yield listeners[0].getsockname(), board
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for one in listeners:
            one.close()
        board.close()


def share(address: tuple[str, int], board: LoadBoard, num: int, gap_s: float) -> float:
    """Of the busiest worker, after `num` connections."""
    row = board.row(0)
    with ExitStack() as clients:
        for _ in range(num):
            clients.enter_context(closing(socket.create_connection(address)))
            time.sleep(gap_s)
        time.sleep(SETTLE_S)
        counts = [row.read(number, CONNECTIONS) for number in range(NUM_WORKERS)]
    time.sleep(SETTLE_S)
    assert sum(counts) == num, counts
    return max(counts) / num


def main() -> None:
    print(f"{'way':<14} {'connections':<22} {'mean':>5} {'worst':>5}   share of the busiest of {NUM_WORKERS} workers")
    for way in WAYS:
        with workers(way) as (address, board):
            for num, gap_s in CASES:
                shares = [share(address, board, num, gap_s) for _ in range(NUM_ROUNDS)]
                how = f"{num} {'one by one' if gap_s else 'at once'}"
                print(f"{way:<14} {how:<22} {statistics.mean(shares):5.2f} {max(shares):5.2f}", flush=True)


if __name__ == "__main__":
    main()

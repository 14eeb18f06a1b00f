"""Every node tells the first one of its NPUs and gets the list of all: what gen_ranktable.sh needs torchrun for.

One JSON line each way over TCP. Like torchrun's rendezvous it trusts its network; what comes is checked for form.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Sequence

from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.rank_table import Entry

MAX_LINE_BYTES = 1 << 20
RETRY_S = 0.2


async def exchanged(ips: Sequence[str], rank: int, mine: Sequence[Entry], port: int, timeout_s: float) -> list[Entry]:
    """The entries of all nodes, in the order of `ips`. Raises ClusterError if some don't come in time."""
    if len(ips) == 1:
        return list(mine)
    if rank == 0:
        return await _gather(ips, mine, port, timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            return await _tell(ips[0], rank, mine, port)
    except TimeoutError as error:
        raise ClusterError(
            f"{ips[0]}:{port} did not answer within {timeout_s:g} s; run the same command on every node at once"
        ) from error


async def _gather(ips: Sequence[str], mine: Sequence[Entry], port: int, timeout_s: float) -> list[Entry]:
    shares: dict[int, list[Entry]] = {0: list(mine)}
    complete, answered = asyncio.Event(), asyncio.Semaphore(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError, KeyError, TypeError), contextlib.closing(writer):
            said = json.loads(await reader.readline())
            rank = int(said["rank"])
            if not 0 < rank < len(ips):
                return
            shares[rank] = _entries(said["entries"])
            if len(shares) == len(ips):
                complete.set()
            await complete.wait()
            every = [entry for rank in range(len(ips)) for entry in shares[rank]]
            writer.write(json.dumps([dataclasses.asdict(entry) for entry in every]).encode() + b"\n")
            await writer.drain()
            answered.release()

    try:
        server = await asyncio.start_server(serve, ips[0], port, limit=MAX_LINE_BYTES)
    except OSError as error:
        raise ClusterError(f"cannot listen on {ips[0]}:{port}: {error.strerror}; give another --port") from error
    try:
        async with server, asyncio.timeout(timeout_s):
            await complete.wait()
            for _ in range(len(ips) - 1):
                await answered.acquire()
    except TimeoutError as error:
        missing = ", ".join(ip for rank, ip in enumerate(ips) if rank not in shares) or "an answer's reader"
        raise ClusterError(
            f"nothing came from {missing} within {timeout_s:g} s; run the same command on every node at once"
        ) from error
    return [entry for rank in range(len(ips)) for entry in shares[rank]]


async def _tell(master: str, rank: int, mine: Sequence[Entry], port: int) -> list[Entry]:
    """Try until the first node listens, and again if it goes away without an answer."""
    line = json.dumps({"rank": rank, "entries": [dataclasses.asdict(entry) for entry in mine]}).encode() + b"\n"
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(master, port, limit=MAX_LINE_BYTES)
            with contextlib.closing(writer):
                writer.write(line)
                answer = await reader.readline()
                if answer.endswith(b"\n"):
                    return _entries(json.loads(answer))
        await asyncio.sleep(RETRY_S)


def _entries(said: list[dict[str, str | int]]) -> list[Entry]:
    """Raises TypeError, ValueError or KeyError where it is none."""
    return [
        Entry(
            str(it["server_id"]),
            int(it["device_id"]),
            str(it["device_ip"]),
            str(it["super_pod_id"]),
            str(it["super_device_id"]),
        )
        for it in said
    ]

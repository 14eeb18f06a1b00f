"""Whether a process can do its work, as seen from outside."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp


async def answers(http: aiohttp.ClientSession, url: str, timeout_s: float) -> bool:
    """http: status 200; tcp://HOST:PORT: the connection is accepted."""
    if url.startswith("tcp://"):
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        return await _accepts(host.strip("[]"), int(port), timeout_s)
    try:
        async with http.get(url) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def _accepts(host: str, port: int, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True

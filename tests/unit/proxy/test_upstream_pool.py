from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from proxy.config import Address, ProxyConfig
from proxy.drain import wait_until
from proxy.upstream_pool import UpstreamPool
from tests.proxy_blackbox.tls import Authority


@pytest.mark.parametrize("closed", [False, True])
async def test_a_handshake_whose_request_has_left_is_ended_and_its_connection_kept(
    tmp_path: Path, closed: bool
) -> None:
    """Or closed, if the instance is none of ours any more by then."""
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("engine", "IP:127.0.0.1"))
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        ended.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        config = ProxyConfig(upstream_tls=True, upstream_ca=str(authority.ca))
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        pool = UpstreamPool(address, config, asyncio.get_running_loop())
        request = asyncio.create_task(pool.connect())
        for _ in range(3):  # it is begun, and needs more turns of the loop than that
            await asyncio.sleep(0)
        assert request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        if closed:
            pool.close()
            await asyncio.wait_for(ended.wait(), 20)
            assert not pool.idle
        else:
            assert await wait_until(lambda: len(pool.idle) == 1, 20) and not pool.active
            assert pool.take_idle() is not None
            pool.close()
            await asyncio.wait_for(ended.wait(), 20)

"""An instance's life: it drains on a signal, and says why it ends when its engine dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import aiohttp
import pytest

from engine_adapter.torch_engine import server
from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.kv_link import KvLink
from engine_adapter.torch_engine.metrics import ServerMetrics
from engine_adapter.torch_engine.sequence import RequestOutput
from engine_adapter.torch_engine.server import Instance, bind
from engine_adapter.torch_engine.server_config import ServerConfig
from engine_adapter.torch_engine.tokenizer import Tokenizer
from tests.unit.engine_adapter.torch_engine.server.fake_engine import ScriptedEngine
from tests.unit.engine_adapter.torch_engine.server.test_http_api import until

BODY = {"prompt": "x"}


class Running:
    """An instance over a scripted engine, with one request that its engine hasn't answered."""

    def __init__(self, tokenizer: Tokenizer, model_dir: Path, drain_timeout_s: float) -> None:
        self.engine = ScriptedEngine(num_blocks_held_by_offers=0)
        self.sock = bind("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        self.instance = Instance(
            ServerConfig(drain_timeout_s=drain_timeout_s),
            EngineConfig(model=model_dir),
            self.engine,  # type: ignore[arg-type]
            tokenizer,
            ServerMetrics("tiny", self.engine.stats, with_process=False),
            KvLink("none"),
            self.sock,
        )

    async def __aenter__(self) -> Running:
        self.life = asyncio.create_task(self.instance.run())
        self.session = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")
        self.request = asyncio.create_task(self.post())
        await until(lambda: self.engine.submitted)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        self.sock.close()

    async def post(self) -> int:
        for _ in range(100):
            try:
                async with self.session.post("/v1/completions", json=BODY) as response:
                    await response.read()
                    return response.status
            except aiohttp.ClientConnectorError:  # not listening yet
                await asyncio.sleep(0.01)
        raise AssertionError("never listened")

    def answer(self) -> None:
        self.engine.emit([RequestOutput(self.engine.submitted[0].request_id, [70], finish_reason="length")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_running_requests_end(tokenizer: Tokenizer, model_dir: Path, number: int) -> None:
    async with Running(tokenizer, model_dir, drain_timeout_s=20) as running:
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.1)
        assert not running.life.done()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", running.port)
        running.answer()
        assert await running.request == 200
        assert await asyncio.wait_for(running.life, 5) == 0


async def test_kv_on_offer_is_waited_for(tokenizer: Tokenizer, model_dir: Path) -> None:
    async with Running(tokenizer, model_dir, drain_timeout_s=20) as running:
        running.engine.num_blocks_held_by_offers = 3
        running.answer()
        assert await running.request == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert not running.life.done()
        running.engine.num_blocks_held_by_offers = 0
        assert await asyncio.wait_for(running.life, 5) == 0


@pytest.mark.parametrize(("drain_timeout_s", "signals"), [(0.05, 1), (60, 2)])
async def test_a_drain_is_cut_short(
    tokenizer: Tokenizer, model_dir: Path, drain_timeout_s: float, signals: int
) -> None:
    async with Running(tokenizer, model_dir, drain_timeout_s) as running:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
        assert await asyncio.wait_for(running.life, 10) == 0
        with pytest.raises(aiohttp.ClientError):
            await running.request
        assert running.engine.aborted == [running.engine.submitted[0].request_id]


async def test_a_dead_engine_fails_what_waits_and_ends_the_instance(
    tokenizer: Tokenizer, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "DEAD_ENGINE_GRACE_S", 0.3)
    async with Running(tokenizer, model_dir, drain_timeout_s=20) as running:
        running.engine.alive = False
        assert await asyncio.wait_for(running.request, 5) == 503
        assert await running.post() == 503
        assert await asyncio.wait_for(running.life, 5) == 1


async def test_a_port_that_another_took_meanwhile_is_said(tokenizer: Tokenizer, model_dir: Path) -> None:
    """Two engines may bind one port while both load; the second to listen must not serve nothing."""
    late = Running(tokenizer, model_dir, drain_timeout_s=1)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", late.port))
        taken.listen()
        with pytest.raises(EngineStartError, match="is in use"):
            await late.instance.run()
    late.sock.close()

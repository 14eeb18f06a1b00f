"""The proxy as its process runs it (uvloop, real sockets), before engines that do what a script says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from proxy.app import ProxyApp
from proxy.config import ProxyConfig
from proxy.drain import wait_until
from tests.unit.proxy.stand_in import Engine


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


class Setup:
    """One proxy, its engines, and what must hold when all is over."""

    def __init__(self, app: ProxyApp, prefillers: list[Engine], decoders: list[Engine]) -> None:
        self.app = app
        self.prefillers = prefillers
        self.decoders = decoders
        self.p = prefillers[0]
        self.d = decoders[0]
        self.port = app.addresses[0].port

    @property
    def engines(self) -> list[Engine]:
        return [*self.prefillers, *self.decoders]

    async def settled(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing is open; fails with what is."""
        await wait_until(lambda: not self.open_things(), timeout_s)
        left = self.open_things()
        assert not left, left

    def open_things(self) -> list[str]:
        app = self.app
        loads = [one.load for one in app.fleet.all]
        found = [repr(load) for load in loads if load.num_requests or load.num_tokens or load.policy_load]
        found += [f"{one.key}: active connection" for one in app.fleet.all if one.pool.active]
        found += [f"KV of {entry.request_id} is {entry.state}" for entry in app.kv_ledger.open]
        if app.num_waiting():
            found.append(f"{app.num_waiting()} waiting for a decoder")
        if app.num_in_flight():
            found.append(f"{app.num_in_flight()} flows")
        if app.reclaimer.num_open:
            found.append(f"{app.reclaimer.num_open} reclaims")
        return found


Start = Callable[..., Awaitable[Setup]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(num_p, num_d, **config)`. At the end everything must be given back."""
    setups: list[Setup] = []

    async def make(num_prefill: int = 1, num_decode: int = 1, *, stock: bool = False, **config: Any) -> Setup:
        prefillers = [Engine("prefill", stock=stock) for _ in range(num_prefill)]
        decoders = [Engine("decode", stock=stock) for _ in range(num_decode)]
        for engine in [*prefillers, *decoders]:
            await engine.start()
        values: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 0,
            "prefiller_hosts": ("127.0.0.1",),
            "prefiller_ports": tuple(engine.port for engine in prefillers),
            "decoder_hosts": ("127.0.0.1",),
            "decoder_ports": tuple(engine.port for engine in decoders),
            "connect_timeout_s": 1,
            "health_interval_s": 60,
            "contract": "pull",
            "drain_timeout_s": 1,
            **config,
        }
        app = ProxyApp(ProxyConfig(**values), asyncio.get_running_loop())
        await app.start()
        setups.append(Setup(app, prefillers, decoders))
        return setups[-1]

    yield make
    try:
        for setup in setups:
            await setup.settled()
            for engine in setup.engines:
                assert not engine.complaints, engine.complaints
    finally:
        for setup in setups:
            await setup.app.drain()
            await setup.app.stop()
            for engine in setup.engines:
                await engine.stop()

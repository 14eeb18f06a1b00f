"""The real proxy and mock instances of one contract, all in this process, over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.mock_engine import MockFleet
from bench.mock_engine import parser as mock_options
from bench.mock_instance import MockInstance
from proxy.app import ProxyApp
from proxy.config import ProxyConfig
from proxy.kv_ledger import KvState

HOST = "127.0.0.1"


class InProcess:
    """Two prefillers, two decoders and a proxy."""

    async def start(self, contract: str, timeout_s: float, **settings: Any) -> None:
        """`timeout_s` is that of each step of a leg; `settings` are the proxy's."""
        flags = ["--contract", contract, "--prefill-ports", "0", "0", "--decode-ports", "0", "0"]
        self.mocks = MockFleet(mock_options().parse_args(flags))
        self.instances: list[MockInstance] = self.mocks.instances
        for instance in self.instances:
            await instance.start()
        ports = [instance.port for instance in self.instances]
        steps = ("connect_timeout_s", "prefill_timeout_s", "first_token_timeout_s", "between_tokens_timeout_s")
        given: dict[str, Any] = dict.fromkeys((*steps, "health_timeout_s"), timeout_s) | settings
        config = ProxyConfig(
            host=HOST, port=0, contract=contract, prefiller_hosts=(HOST,), prefiller_ports=tuple(ports[:2]),
            decoder_hosts=(HOST,), decoder_ports=tuple(ports[2:]), prefiller_bootstrap_ports=tuple(ports[:2]),
            prefiller_kv_ports=tuple(ports[:2]), decoder_kv_ports=tuple(ports[2:]), health_retry_interval_s=0.05,
            reclaim_timeout_s=1, drain_timeout_s=1, **given,
        )  # fmt: skip
        self.app = ProxyApp(config, asyncio.get_running_loop())
        await self.app.start()
        self.port = self.app.addresses[0].port

    async def stop(self) -> None:
        await self.app.drain()
        await self.app.stop()
        for instance in self.instances:
            await instance.close()
        await asyncio.sleep(0.01)

    def left(self) -> list[str]:
        """What is still open anywhere."""
        app = self.app
        found = [repr(one.load) for one in app.fleet.all if one.load.num_requests or one.load.num_tokens]
        found += [f"{one.key}: KV reserved" for one in app.fleet.all if one.load.kv_tokens]
        found += [f"{one.key}: active connection" for one in app.fleet.all if one.pool.active]
        found += [f"KV of {entry.request_id} is {entry.state}" for entry in app.kv_ledger.open]
        counts = {"waiting": app.num_waiting(), "open": app.num_in_flight(), "reclaims": app.reclaimer.num_open}
        found += [f"{number} {name}" for name, number in counts.items() if number]
        found += [f"{one.port}: running" for one in self.instances if one.running]
        totals = app.kv_ledger.totals
        ended = totals[KvState.CONSUMED] + totals[KvState.RECLAIMED] + totals[KvState.ORPHANED]
        if totals[KvState.HELD] != ended:
            found.append(f"KV handed out and ended: {totals}")
        num_lost = totals[KvState.ORPHANED]  # those no decoder could be told of in time
        if len(outstanding := self.mocks.ledger.outstanding()) > num_lost:
            found.append(f"KV the prefillers still hold: {outstanding}, {num_lost} orphaned")
        return found

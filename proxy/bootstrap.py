"""Where the KV side of an instance listens, and who is behind a prefiller's bootstrap server (contract `mooncake`).

Engine ids are asked by `GET /query` (kv-contracts section 2.2) once and kept until there is a sign that the engine may
be another one: a failed request, a refused connection, or an idle connection that it closed.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from proxy.config import Address, ProxyConfig
from proxy.contracts.pair import Endpoint, EngineRank
from proxy.errors import Failure, UpstreamFailure
from proxy.instance import Instance, Role
from proxy.upstream_pool import UpstreamPool


class RankReservation:
    """A request on one rank of a prefiller; `release()` gives it back once."""

    __slots__ = ("_rank", "engine")

    def __init__(self, rank: _Rank) -> None:
        self.engine = rank.engine
        self._rank: _Rank | None = rank
        rank.num_open += 1
        rank.num_ever += 1

    def release(self) -> None:
        if self._rank is not None:
            self._rank.num_open -= 1
            self._rank = None


class _Rank:
    __slots__ = ("engine", "num_ever", "num_open")

    def __init__(self, engine: EngineRank) -> None:
        self.engine = engine
        self.num_open = 0
        self.num_ever = 0


class _Ranks:
    """What a bootstrap server said, and of which life of the instance."""

    __slots__ = ("num_breaks", "ranks")

    def __init__(self, ranks: list[_Rank], num_breaks: int) -> None:
        self.ranks = ranks
        self.num_breaks = num_breaks


class Bootstrap:
    def __init__(self, config: ProxyConfig, loop: asyncio.AbstractEventLoop) -> None:
        self._config = config
        self._loop = loop
        sglang_or_mooncake = config.prefiller_bootstrap_ports
        ports = config.prefiller_kv_ports if config.contract == "p2p-nccl" else sglang_or_mooncake
        self._ports = {
            Role.PREFILL: _port_of(config.prefillers, ports),
            Role.DECODE: _port_of(config.decoders, config.decoder_kv_ports),
        }
        self._default = {Role.PREFILL: ports[0], Role.DECODE: config.decoder_kv_ports[0]}
        self._known: dict[Instance, _Ranks] = {}
        self._asking: dict[Instance, asyncio.Task[_Ranks]] = {}

    def endpoint(self, instance: Instance) -> Endpoint:
        ports, default = self._ports[instance.role], self._default[instance.role]
        port = ports.get(instance.address) or ports.get(instance.name, default)
        return Endpoint(instance.address.host, port)

    def forget(self, instance: Instance) -> None:
        self._known.pop(instance, None)

    async def reserve_rank(self, instance: Instance) -> RankReservation:
        """The least used rank of a prefiller. Raises UpstreamFailure if its bootstrap server doesn't say."""
        known = self._known.get(instance)
        if known is None or known.num_breaks != instance.pool.num_breaks:
            known = await self._ask(instance)
        return RankReservation(min(known.ranks, key=lambda one: (one.num_open, one.num_ever)))

    async def _ask(self, instance: Instance) -> _Ranks:
        """Many may wait for one question; whoever leaves doesn't end it for the others."""
        asking = self._asking.get(instance)
        if asking is None:
            asking = self._asking[instance] = self._loop.create_task(self._query(instance))
            asking.add_done_callback(lambda done: self._answered(instance, done))
        return await asyncio.shield(asking)

    def _answered(self, instance: Instance, asking: asyncio.Task[_Ranks]) -> None:
        self._asking.pop(instance, None)
        if not asking.cancelled() and asking.exception() is None:
            self._known[instance] = asking.result()

    async def _query(self, instance: Instance) -> _Ranks:
        num_breaks = instance.pool.num_breaks
        endpoint = self.endpoint(instance)
        answer = await query(endpoint, self._config, self._loop)
        engines = engines_of(answer)
        if not engines:
            raise UpstreamFailure(Failure.SERVER_ERROR, f"the bootstrap server at {endpoint} names no engine")
        return _Ranks([_Rank(one) for one in engines], num_breaks)


def _port_of(addresses: tuple[Address, ...], ports: tuple[int, ...]) -> dict[Address, int]:
    return dict(zip(addresses, ports if len(ports) > 1 else ports * len(addresses), strict=True))


async def query(endpoint: Endpoint, config: ProxyConfig, loop: asyncio.AbstractEventLoop) -> bytes:
    """The body of `GET /query`. Raises UpstreamFailure."""
    pool = UpstreamPool(Address(endpoint.host, endpoint.port), config, loop)
    try:
        async with asyncio.timeout(config.connect_timeout_s + config.health_timeout_s):  # to connect has its own
            answer = await pool.call(b"GET /query HTTP/1.1\r\n", timeout_s=config.health_timeout_s)
    except TimeoutError:
        raise UpstreamFailure(Failure.TIMEOUT, f"the bootstrap server at {endpoint} does not answer") from None
    finally:
        pool.close()
    if answer.status >= 300:
        raise UpstreamFailure(Failure.SERVER_ERROR, f"the bootstrap server at {endpoint} answered {answer.status}")
    return answer.body


def engines_of(body: bytes) -> list[EngineRank]:
    """`{"<dp_rank>": {"engine_id": ...}}` by rank. Raises UpstreamFailure if it is anything else."""
    try:
        found: Any = orjson.loads(body)
        return sorted(EngineRank(int(rank), str(one["engine_id"])) for rank, one in found.items())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UpstreamFailure(Failure.GARBAGE, "the bootstrap server's answer is not understood") from None

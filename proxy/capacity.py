"""How much a decoder can hold, configured or read from its `/metrics`, and how many requests wait in an instance.

vLLM says the size of its KV pool in the labels of `vllm:cache_config_info` (block_size, num_gpu_blocks); our engine
says the same. An instance that says nothing and has nothing configured counts as having room always.
"""

from __future__ import annotations

import asyncio
import logging
import re

from proxy.config import ProxyConfig
from proxy.errors import UpstreamFailure
from proxy.instance import Fleet, Instance, Role

log = logging.getLogger(__name__)

QUEUES_AFTER_S = 1.0  # capacities are read at once, for requests wait on them; queues are for operators, and can wait

_CACHE_CONFIG = re.compile(rb"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)
_WAITING = re.compile(
    rb"^(?:vllm:num_requests_waiting|sglang:num_queue_reqs)(?:\{[^}]*\})? ([0-9.]+(?:e[+-]?[0-9]+)?)", re.MULTILINE
)
_LABEL = re.compile(rb'(\w+)="([^"]*)"')


def kv_tokens_of(exposition: bytes) -> int | None:
    """Tokens of KV an engine's pool holds, added up over its data-parallel ranks; None if it doesn't say."""
    total = 0
    for found in _CACHE_CONFIG.finditer(exposition):
        labels = dict(_LABEL.findall(found[1]))
        try:
            total += int(labels[b"block_size"]) * int(labels[b"num_gpu_blocks"])
        except (KeyError, ValueError):  # "None" where the engine has not decided yet
            continue
    return total or None


def num_waiting_of(exposition: bytes) -> int | None:
    """Requests that wait in an engine's own queue, added up over its ranks; None if it doesn't say."""
    found = _WAITING.findall(exposition)
    return int(sum(map(float, found))) if found else None


class CapacityReader:
    """Keeps what instances say of themselves current: every so often, and when an instance becomes a member."""

    def __init__(self, config: ProxyConfig, fleet: Fleet, loop: asyncio.AbstractEventLoop, bearer_line: bytes) -> None:
        self._config = config
        self._fleet = fleet
        self._loop = loop
        self._head = b"GET /metrics HTTP/1.1\r\n" + bearer_line
        self._task: asyncio.Task[None] | None = None
        self._reading: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._task = self._loop.create_task(self._run())

    def stop(self) -> None:
        for task in (self._task, *self._reading):
            if task is not None:
                task.cancel()

    def read_soon(self, instance: Instance) -> None:
        """It is new: the next round may be far off, and until then it would count as having room always."""
        task = self._loop.create_task(self._settle(instance))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _run(self) -> None:
        await asyncio.gather(*(self._settle(one) for one in self._fleet.members[Role.DECODE]))
        await asyncio.sleep(min(QUEUES_AFTER_S, self._config.capacity_interval_s))
        while True:
            await asyncio.gather(*(self._settle(one) for one in self._fleet.all))
            await asyncio.sleep(self._config.capacity_interval_s)

    async def _settle(self, instance: Instance) -> None:
        config, load = self._config, instance.load
        if instance.role is Role.DECODE:
            load.max_streams = config.decoder_max_streams
            load.max_kv_tokens = config.decoder_kv_tokens or load.max_kv_tokens
        if not instance.health.healthy:
            instance.num_waiting = None
            return
        instance.num_probes += 1
        try:
            answer = await instance.pool.call(self._head, timeout_s=config.health_timeout_s)
        except UpstreamFailure:
            instance.num_waiting = None
            return  # its health is the prober's business
        finally:
            instance.num_probes -= 1
        told = answer.body if answer.status == 200 else b""
        instance.num_waiting = num_waiting_of(told)
        if instance.role is not Role.DECODE or config.decoder_kv_tokens:
            return
        found = kv_tokens_of(told)
        usable = int(found * config.decoder_kv_overcommit) if found else 0
        if usable != load.max_kv_tokens:
            load.max_kv_tokens = usable
            log.info("event=capacity instance=%s kv_tokens=%d", instance.key, usable)

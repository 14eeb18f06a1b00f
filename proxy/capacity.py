"""How much a decoder can hold: configured, or read from its `/metrics`.

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

_CACHE_CONFIG = re.compile(rb"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)
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


class CapacityReader:
    """Keeps the decoders' capacities current: configured ones at once, else by asking every so often."""

    def __init__(self, config: ProxyConfig, fleet: Fleet, loop: asyncio.AbstractEventLoop, bearer_line: bytes) -> None:
        self._config = config
        self._fleet = fleet
        self._loop = loop
        self._head = b"GET /metrics HTTP/1.1\r\n" + bearer_line
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = self._loop.create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.gather(*(self._settle(one) for one in self._fleet.members[Role.DECODE]))
            await asyncio.sleep(self._config.capacity_interval_s)

    async def _settle(self, instance: Instance) -> None:
        config, load = self._config, instance.load
        load.max_streams = config.decoder_max_streams
        if config.decoder_kv_tokens:
            load.max_kv_tokens = config.decoder_kv_tokens
            return
        if not instance.health.healthy:
            return
        instance.num_probes += 1
        try:
            answer = await instance.pool.call(self._head, timeout_s=config.health_timeout_s)
        except UpstreamFailure:
            return  # its health is the prober's business
        finally:
            instance.num_probes -= 1
        found = kv_tokens_of(answer.body) if answer.status == 200 else None
        usable = int(found * config.decoder_kv_overcommit) if found else 0
        if usable != load.max_kv_tokens:
            load.max_kv_tokens = usable
            log.info("event=capacity instance=%s kv_tokens=%d", instance.key, usable)

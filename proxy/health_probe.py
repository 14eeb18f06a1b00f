"""Asking instances how they are: `GET /health`, seldom while they are well, often while they are out.

An instance that is added is asked for `GET /v1/models` first, as the seeds' proxy does (ascend-proxy.md 2.1,
NodeListener).
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from proxy.config import ProxyConfig
from proxy.errors import Failure, UpstreamFailure
from proxy.instance import Fleet, Instance

log = logging.getLogger(__name__)


class Prober:
    """One task an instance; `follow` starts and ends them as the membership changes."""

    def __init__(
        self, config: ProxyConfig, fleet: Fleet, loop: asyncio.AbstractEventLoop, bearer_line: bytes = b""
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._loop = loop
        self._bearer_line = bearer_line
        self._watchers: dict[Instance, asyncio.Task[None]] = {}

    def follow(self) -> None:
        members = set(self._fleet.all)
        for instance in members - self._watchers.keys():
            self._watchers[instance] = self._loop.create_task(self._watch(instance))
        for instance in self._watchers.keys() - members:
            self._watchers.pop(instance).cancel()

    def stop(self) -> None:
        for task in self._watchers.values():
            task.cancel()
        self._watchers.clear()

    async def _watch(self, instance: Instance) -> None:
        config = self._config
        while True:
            await self.probe(instance)
            await asyncio.sleep(
                config.health_interval_s
                if instance.health.healthy and not instance.health.num_failures
                else config.health_retry_interval_s
            )

    async def probe(self, instance: Instance) -> bool:
        """Any answer below 500 will do: an engine without /health is still an engine.

        Where an instance that is out says nothing, those who wait on it since before the probe are told."""
        health, began, is_silent = instance.health, monotonic(), False
        instance.num_probes += 1
        try:
            answer = await instance.pool.call(
                b"GET /health HTTP/1.1\r\n" + self._bearer_line, timeout_s=self._config.health_timeout_s
            )
            error = "" if answer.status < 500 else f"GET /health answered {answer.status}"
        except UpstreamFailure as failure:
            if failure.failure is Failure.STALE:  # an idle connection that the engine closed: says nothing
                return health.healthy
            error = failure.message
            # A refusal is an answer: the machine is up, and would have reset the connections of a process that died.
            is_silent = failure.failure in (Failure.TIMEOUT, Failure.CONNECT_TIMEOUT)
            if is_silent and instance.pool.heard_since(began):
                return health.healthy  # busy, and alive: bytes of an answer have come meanwhile
        finally:
            instance.num_probes -= 1
        if not error:
            if health.succeeded():
                instance.load.forget()
                log.warning("event=instance_back role=%s instance=%s", instance.role.value, instance.key)
            return True
        if health.failed(monotonic(), error):
            log.warning("event=instance_out role=%s instance=%s reason=%r", instance.role.value, instance.key, error)
        if not health.healthy and is_silent:
            instance.pool.instance_is_out(min(began, monotonic() - self._config.health_timeout_s))
        return False

    async def serves(self, instance: Instance) -> str:
        """Why an instance that wants to join can't yet; empty once it lists its models."""
        head = b"GET /v1/models HTTP/1.1\r\n" + self._bearer_line
        timeout_s = self._config.health_timeout_s
        try:
            async with asyncio.timeout(timeout_s):  # the sweep that ends overdue calls knows members only
                answer = await instance.pool.call(head, timeout_s=timeout_s)
        except UpstreamFailure as failure:
            return failure.message
        except TimeoutError:
            return "no answer in time"
        return "" if answer.status < 300 else f"GET /v1/models answered {answer.status}"

"""Giving KV back that nobody will read, in the background: a decoder is told to drop it (INTERFACES:
`release_only`)."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any

from proxy.config import ProxyConfig
from proxy.contracts import Contract
from proxy.errors import Failure, UpstreamFailure
from proxy.instance import Fleet, Instance, Role
from proxy.kv_ledger import KvEntry, KvLedger, KvState
from proxy.long_body import Body
from proxy.openai_api import ApiCall
from proxy.scheduling.candidate import candidates

log = logging.getLogger(__name__)

AGAIN_S = 0.2  # between rounds of asking, while no decoder can be reached


class Reclaimer:
    def __init__(
        self,
        config: ProxyConfig,
        fleet: Fleet,
        ledger: KvLedger,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()

    def give_back(self, entry: KvEntry, contract: Contract, call: ApiCall, target: bytes, forwarded: bytes) -> None:
        """Take `entry` over. `target` and `forwarded` are the request target and header lines of the original
        request."""
        if not contract.may_reclaim(entry.kv, entry.dispatched):
            self._ledger.move(entry, KvState.ORPHANED)
            return
        self._ledger.move(entry, KvState.RECLAIMING)
        task = self._loop.create_task(self._reclaim(entry, contract, call, target, forwarded))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reclaim(
        self, entry: KvEntry, contract: Contract, call: ApiCall, target: bytes, forwarded: bytes
    ) -> None:
        head = b"POST %b HTTP/1.1\r\n%bX-Request-Id: %b\r\n" % (
            target,
            forwarded,
            f"{entry.request_id}-reclaim".encode("ascii"),
        )
        state, reason = KvState.ORPHANED, "no decoder"
        try:
            body = contract.reclaim_body(call, entry.kv)
            async with asyncio.timeout(self._config.reclaim_timeout_s):
                status, reason = await self._ask_decoders(head, body, contract, entry.kv)
            if 200 <= status < 300:
                state = KvState.RECLAIMED
        except TimeoutError:
            reason = "no answer in time"
        finally:
            self._ledger.move(entry, state)
            if state is KvState.ORPHANED:
                log.warning(
                    "event=kv_orphaned request_id=%s prefiller=%s reason=%r", entry.request_id, entry.prefiller, reason
                )

    async def _ask_decoders(self, head: bytes, body: Body, contract: Contract, kv: dict[str, Any]) -> tuple[int, str]:
        """The status of the first decoder that answers; asks on until the caller ends it.

        A decoder that was reached and did not answer may have acted: another is asked where the contract allows."""
        tried: set[Instance] = set()
        while True:
            fit = candidates(self._fleet.members[Role.DECODE], tried, monotonic())
            decoder = min(fit, key=lambda one: one.load.all_requests, default=None)
            if decoder is None or decoder in tried:  # all were asked: perhaps one comes back in time
                await asyncio.sleep(AGAIN_S)
                tried.clear()
                continue
            tried.add(decoder)
            try:
                answer = await decoder.pool.call(head, body, timeout_s=self._config.reclaim_timeout_s)
            except UpstreamFailure as failure:
                reached = failure.failure not in (Failure.REFUSED, Failure.CONNECT_TIMEOUT)
                if reached and not contract.may_reclaim(kv, True):
                    return 0, failure.message
                continue
            return answer.status, f"status {answer.status}"

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    async def finish(self) -> None:
        """Wait for what is under way; every reclaim has a deadline of its own."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

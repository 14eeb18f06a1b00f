"""One worker among others: what it answers for all of them, and what it does because another was told to.

Whatever is asked over HTTP arrives in one worker. A change is made there first, where it is checked, then in the
others, and answered when all have made it or failed to; what is shown is added up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from proxy.errors import ProxyError
from proxy.load_board import SERVING
from proxy.metric_families import FAMILIES
from proxy.workers import instances_sum, metrics, metrics_sum
from proxy.workers.frames import PARENT
from proxy.workers.peers import ANSWER_TIMEOUT_S, Peers, Replies
from proxy.workers.seat import Seat

log = logging.getLogger(__name__)

Json = dict[str, Any]
DECLARED = {name: str(one.merged) for name, one in FAMILIES.items()}
SHOW_TIMEOUT_S = 2.0
SNAPSHOT_TIMEOUT_S = 3.0
TELL_TOTALS_S = 5.0  # a worker that is killed takes with it what it counted since, where no scrape has seen it


class Crew:
    def __init__(self, seat: Seat, loop: asyncio.AbstractEventLoop) -> None:
        self.seat = seat
        self.worker = seat.worker
        self.row = seat.row
        self.peers = Peers(seat.worker, seat.channel, loop)
        self._loop = loop
        self._teller: asyncio.Task[None] | None = None
        self._collect: Callable[[], bytes] = bytes
        self._show: Callable[[], Json] = dict

        async def starting(_: Any, __: bytes) -> tuple[Any, bytes]:
            raise ProxyError(503, "it is only just starting")

        self.peers.early["snapshot"] = starting

    # --- wiring

    def shows(self, collect: Callable[[], bytes], show: Callable[[], Json]) -> None:
        """What this worker says of itself: its metrics (`metrics.dump`) and what `/instances` is made of."""
        self._collect, self._show = collect, show

        async def dumped(_: Any, __: bytes) -> tuple[Any, bytes]:
            return None, collect()

        async def shown(_: Any, __: bytes) -> tuple[Any, bytes]:
            return show(), b""

        self.peers.handlers.update(metrics=dumped, instances=shown)

    def does(self, call: str, act: Callable[[Any], Awaitable[Any]]) -> None:
        """What this worker does when another was told to."""

        async def done(fields: Any, _: bytes) -> tuple[Any, bytes]:
            return await act(fields), b""

        self.peers.handlers[call] = done

    # --- life

    async def snapshot(self) -> Json | None:
        """What the others know; None if there is nobody to ask."""
        replies = await self.peers.ask("snapshot", timeout_s=SNAPSHOT_TIMEOUT_S)
        found = next((one.fields for one in replies.of if not one.error), None)
        if found is None:
            log.warning("event=worker_alone worker=%d reason=%r", self.worker, replies.failed)
        return dict(found) if found else None

    def serve(self) -> None:
        self.row.beat()
        self.row.note(SERVING, 1)
        self.peers.serve()
        self.peers.tell_parent("ready")
        self._teller = self._loop.create_task(self._tell_totals())

    async def _tell_totals(self) -> None:
        while True:
            await asyncio.sleep(TELL_TOTALS_S)
            self.peers.tell_parent("totals", None, self._collect())

    def leaving(self) -> None:
        """It takes no more, and is not waited for."""
        self.row.note(SERVING, 0)

    def stop(self) -> None:
        self.peers.tell_parent("totals", None, self._collect())
        if self._teller is not None:
            self._teller.cancel()
        self.peers.close()

    # --- answering for all

    def missing(self) -> list[int]:
        return self.row.board.missing()

    async def exposition(self) -> bytes:
        """The metrics of all, added up."""
        own = self._collect()  # told to the parent, and shown: the same, or a later scrape might show less
        replies = await self._ask_awake("metrics", own)
        others = [orjson.loads(one.body) for one in replies.of if not one.error]
        kept = metrics_sum.read_kept(replies.parent, set(self.row.others) - replies.answered)
        num_serving = self.row.board.num_workers - len(self.missing())
        return metrics.exposition(metrics_sum.joined([orjson.loads(own), *others, *kept], DECLARED), num_serving)

    async def instances(self) -> Json:
        replies = await self._ask_awake("instances")
        whole = instances_sum.joined([self._show(), *(one.fields for one in replies.of if not one.error)])
        missing = self.missing()
        silent = set(self.row.others) - replies.answered - set(missing)
        num_serving = self.row.board.num_workers - len(missing)
        whole["workers"] = {"serving": num_serving, "missing": missing, "silent": sorted(silent)}
        return whole

    async def _ask_awake(self, call: str, body: bytes = b"") -> Replies:
        """Who looks at the proxy does not wait for a worker that is stuck."""
        return await self.peers.ask(call, None, body, to=self.row.awake(), timeout_s=SHOW_TIMEOUT_S)

    # --- doing in all

    async def everywhere(self, call: str, fields: Any, timeout_s: float = 0.0) -> list[Any]:
        """Have the others do it too. Returns their answers. Raises ProxyError that names who has not."""
        replies = await self.peers.ask(call, fields, timeout_s=ANSWER_TIMEOUT_S + timeout_s)
        if replies.failed:
            raise ProxyError(500, f"Not done by all worker processes: {_named(replies)}. The others have done it.")
        return [one.fields for one in replies.of]

    async def elsewhere(self, worker: int, call: str, fields: Any, timeout_s: float) -> Any:
        """Have one other worker do it. Raises ProxyError."""
        replies = await self.peers.ask(call, fields, to=[worker], timeout_s=timeout_s)
        reply = next(iter(replies.of), None)
        if reply is None:
            raise ProxyError(404, f"There is no worker {worker}.", error_type="NotFoundError")
        if reply.error:
            raise ProxyError(reply.fields if isinstance(reply.fields, int) else 502, reply.error)
        return reply.fields


def _named(replies: Replies) -> str:
    return "; ".join(
        why if worker == PARENT else f"worker {worker}: {why.rstrip('.')}" for worker, why in replies.failed.items()
    )

"""Admission: a decoder's place is reserved before a prompt is prefilled, and beyond the room there is, requests wait.

Room is streams and tokens of KV (`InstanceLoad.has_room`), configured or read from the instances' metrics
(`capacity.py`). While there is room and nobody waits, admission costs a call and awaits nothing. The queue is bounded
(429 beyond it), fair between API keys, ordered by the request's `priority`, and has a deadline (503 after it).

Each of several worker processes has a queue of its own. The bound is for all together, a newcomer does not overtake
another worker's queue, and whose first request is the oldest goes first; keys and priorities are weighed in each queue.
"""

from __future__ import annotations

import asyncio
from time import monotonic, monotonic_ns

from proxy.config import ProxyConfig
from proxy.errors import ProxyError
from proxy.fair_queue import FairQueue, Ticket
from proxy.flow import Flow
from proxy.instance import Fleet, Instance, Role
from proxy.legs import Legs
from proxy.load_board import HEAD_SINCE, WAITING

POLL_S = 0.005  # between looks at what the other workers hold, while somebody waits here
WAIT_WEIGHT = 0.2  # of the latest wait in the moving average that Retry-After is made from
MAX_RETRY_AFTER_S = 60.0


class Waiter:
    """A flow in the queue and the future that says it has its decoder."""

    __slots__ = ("flow", "since_ns", "turn")

    def __init__(self, flow: Flow, turn: asyncio.Future[None]) -> None:
        self.flow = flow
        self.turn = turn
        self.since_ns = monotonic_ns()


class Admission:
    def __init__(self, config: ProxyConfig, legs: Legs, fleet: Fleet, loop: asyncio.AbstractEventLoop) -> None:
        self._board = fleet.board
        self._config = config
        self._legs = legs
        self._fleet = fleet
        self._loop = loop
        self._queue: FairQueue[Waiter] = FairQueue()
        self._wait_s = 1.0
        self._is_called = False
        self._is_polling = False
        self.num_rejected = {"full": 0, "too_late": 0}

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    async def admit(self, flow: Flow) -> None:
        """Leaves with a decoder reserved in `flow`. Raises ProxyError: 429 (queue full), 503 (too late, no decoder)."""
        elsewhere = self._board.num_waiting_elsewhere() if self._board is not None else 0
        if not self._queue and not elsewhere and self._legs.reserve_decoder(flow, only_with_room=True):
            return
        if len(self._queue) + elsewhere >= self._config.max_queued_requests:
            self.num_rejected["full"] += 1
            raise self._rejection(429, "All decode capacity is taken and the queue is full.")
        began = monotonic()
        waiter = Waiter(flow, self._loop.create_future())
        ticket = self._queue.push(flow.head.identity, priority_of(flow), flow.cost.kv_tokens, waiter)
        self._note_queue()
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                await waiter.turn
        except TimeoutError:
            self.num_rejected["too_late"] += 1
            raise self._rejection(503, "No decode capacity became free in time (--queue-timeout-s).") from None
        finally:
            self._queue.leave(ticket, served=waiter.turn.done() and not waiter.turn.cancelled())
            self._note_queue()
            self.wake()
        self._wait_s += WAIT_WEIGHT * (monotonic() - began - self._wait_s)

    def _rejection(self, status: int, message: str) -> ProxyError:
        after_s = round(min(max(self._wait_s, 1.0), MAX_RETRY_AFTER_S))
        kind = "rate_limit_exceeded" if status == 429 else "ServiceUnavailableError"
        return ProxyError(status, message, error_type=kind, retry_after_s=after_s)

    def watch(self, instance: Instance) -> None:
        """Be told when work on `instance` ends."""
        instance.load.on_release = self.wake

    def wake(self) -> None:
        """Room may have become free: look once, soon. Cheap when nobody waits."""
        if self._queue and not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._serve_waiting)

    def _serve_waiting(self) -> None:
        self._is_called = False
        while (ticket := self._queue.first()) is not None:
            if not self._serve(ticket):
                break
        self._note_queue()

    def _note_queue(self) -> None:
        """Let the other workers know, and look at what they have given back as long as somebody waits."""
        board = self._board
        if board is None:
            return
        first = self._queue.first()
        board.note(WAITING, len(self._queue))
        board.note(HEAD_SINCE, first.item.since_ns if first is not None else 0)
        if first is not None and not self._is_polling:
            self._is_polling = True
            self._loop.call_later(POLL_S, self._poll)

    def _poll(self) -> None:
        self._is_polling = False
        self._serve_waiting()

    def _serve(self, ticket: Ticket[Waiter]) -> bool:
        """Whether the next one may be looked at: who doesn't fit yet is not overtaken, or it might wait for ever."""
        waiter = ticket.item
        if self._board is not None and not self._board.is_first(waiter.since_ns):
            return False
        if not waiter.turn.done():
            try:
                if not self._legs.reserve_decoder(waiter.flow, only_with_room=True):
                    return False
                waiter.turn.set_result(None)
            except ProxyError as error:  # no decoder is left at all
                waiter.turn.set_exception(error)
        self._queue.leave(ticket, served=True)
        return True

    def tick(self) -> None:
        """Now and then: capacities change without a request that ends, and so does the membership."""
        for instance in self._fleet.members[Role.DECODE]:
            self.watch(instance)
        self.wake()


def priority_of(flow: Flow) -> int:
    """vLLM's field: an integer, a smaller one goes first, 0 if absent. What is no integer is the engine's to refuse."""
    priority = flow.call.outline.get("priority")
    return priority if type(priority) is int else 0

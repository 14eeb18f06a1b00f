"""A KvTransfer whose sidecar sees a staging buffer in place of the KV pool (memory providers staging and in_process).

What is offered is copied into slots first; what is pulled arrives in slots and is copied on before its end is told.
The buffer is bounded: a pull waits for free slots in the order of arrival, up to its own time limit, and an offer for
a moment, in which the engine computes nothing either: decoders that don't fetch hold their prefiller up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine_adapter.memory.slots import Run, Slots, runs
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransfer, KvTransferUnavailable, PullResult
from sidecar.protocol import Ready

logger = logging.getLogger(__name__)

OFFER_WAIT_S = 2.0
"""An offer waits this long for slots; then its request is answered without KV, and decoded from its text."""
LOOK_AGAIN_S = 0.002
"""After this a copy to the device that is under way is looked at again."""


class Copies(Protocol):
    """See device.BlockCopies."""

    def out(self, runs: Sequence[Run]) -> None: ...

    def into(self, runs: Sequence[Run]) -> Callable[[], bool]: ...


@dataclass(frozen=True, slots=True)
class _Pull:
    """A pull, or a landing. `begin` is told its slots."""

    request_id: str
    params: dict[str, Any]
    block_ids: list[int]
    begin: Callable[[list[int]], None]
    asked_at: float


@dataclass(slots=True)
class _Push:
    """Blocks under computation and their slots; all before number `num_copied` are copied for good."""

    block_ids: list[int]
    slots: list[int]
    num_copied: int = 0


class StagedKvTransfer:
    """See kv_transfer.KvTransfer. `wake` has the engine poll; `news` is set when the sidecar has told something."""

    def __init__(
        self,
        inner: KvTransfer,
        slots: Slots,
        copies: Copies,
        *,
        pull_timeout_s: float,
        wake: Callable[[], None],
        news: threading.Event,
        offer_wait_s: float = OFFER_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._slots = slots
        self._copies = copies
        self._pull_timeout_s = pull_timeout_s
        self._wake = wake
        self._news = news
        self._offer_wait_s = offer_wait_s
        self._clock = clock
        self._offered: dict[str, list[int]] = {}
        self._waiting: deque[_Pull] = deque()
        self._pulling: dict[str, tuple[_Pull, list[int]]] = {}
        self._arriving: list[tuple[PullResult, list[int], Callable[[], bool]]] = []
        self._pushes: dict[str, _Push] = {}
        self._events = KvEvents()
        self.check = inner.check
        self.drop = inner.drop
        self.revoke = inner.revoke
        self.close = inner.close

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        """Copy the blocks out and offer the copies. Raises KvTransferUnavailable, also while the buffer stays full."""
        slots = self._take_within(len(block_ids), self._offer_wait_s)
        try:
            self._copies.out(runs(block_ids, slots))
            params = self._inner.offer(request_id, slots, num_tokens, num_cached_tokens)
        except BaseException:
            self._slots.give_back(slots)
            raise
        self._offered[request_id] = slots
        return params

    def start_pull(self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int) -> None:
        """As KvTransfer has it; the pull begins when there are slots for all of it."""

        def begin(slots: list[int]) -> None:
            self._inner.start_pull(request_id, params, slots, first_block)

        self._waiting.append(_Pull(request_id, params, local_block_ids, begin, self._clock()))
        self._begin_pulls()

    def land(
        self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int, num_tokens: int
    ) -> None:
        """As KvTransfer has it; slots are held out, and a prefill is asked for when there are enough."""

        def begin(slots: list[int]) -> None:
            self._inner.land(request_id, params, slots, first_block, num_tokens)

        self._waiting.append(_Pull(request_id, params, local_block_ids, begin, self._clock()))
        self._begin_pulls()

    def push(
        self, request_id: str, params: dict[str, Any], block_ids: list[int], num_tokens: int, ready: Ready
    ) -> None:
        """As KvTransfer has it, of slots that are filled as blocks are marked. Raises KvTransferUnavailable."""
        push = _Push(block_ids, self._take_within(len(block_ids), self._offer_wait_s))
        try:
            self._copy_ready(push, ready)
            self._inner.push(request_id, params, push.slots, num_tokens, ready)
        except BaseException:
            self._slots.give_back(push.slots)
            raise
        self._pushes[request_id] = push

    def mark_ready(self, request_id: str, ready: Ready) -> None:
        """As KvTransfer has it; what is marked is copied first, within the forward."""
        if (push := self._pushes.get(request_id)) is not None:
            self._copy_ready(push, ready)
            self._inner.mark_ready(request_id, ready)

    def _copy_ready(self, push: _Push, ready: Ready) -> None:
        """Blocks go whole, once a layer that is marked: what is not computed yet is not read, and copied again."""
        begin, end = push.num_copied, ready.end_block
        self._copies.out(runs(push.block_ids[begin:end], push.slots[begin:end]))
        push.num_copied = ready.first_block

    def abandon(self, request_id: str) -> None:
        """As KvTransfer has it; the lease of a pull that has not begun is dropped."""
        waiting = next((pull for pull in self._waiting if pull.request_id == request_id), None)
        if waiting is None:
            self._inner.abandon(request_id)
            return
        self._inner.drop(waiting.params)
        self._refuse(waiting, "abandoned", "the engine abandoned it")

    def poll(self) -> KvEvents:
        """What has ended since the last call, and whose blocks are in place."""
        self._take_events()
        self._refuse_late(self._clock())
        self._begin_pulls()
        if self._arriving:
            threading.Timer(LOOK_AGAIN_S, self._wake).start()
        events, self._events = self._events, KvEvents()
        return events

    def _take_within(self, count: int, seconds: float) -> list[int]:
        """Raises KvTransferUnavailable if there are not enough in time."""
        deadline = self._clock() + seconds
        while (slots := self._slots.take(count)) is None and count <= self._slots.num_slots:
            left = deadline - self._clock()
            if left <= 0:
                break
            self._news.wait(min(left, LOOK_AGAIN_S if self._arriving else left))
            self._take_events()
        if slots is None:
            raise KvTransferUnavailable(
                f"the staging buffer has {self._slots.num_free} of {self._slots.num_slots} blocks free, "
                f"{count} are needed: give more --kv-staging-bytes"
            )
        return slots

    def _take_events(self) -> None:
        self._news.clear()
        events = self._inner.poll()
        for request_id in events.ended_offers:
            self._slots.give_back(self._offered.pop(request_id, ()))
        self._events.ended_offers.extend(events.ended_offers)
        for request_id, _ in events.ended_pushes:
            if (push := self._pushes.pop(request_id, None)) is not None:
                self._slots.give_back(push.slots)
        self._events.ended_pushes.extend(events.ended_pushes)
        for result in events.pulls:
            self._pull_ended(result)
        arriving, self._arriving = self._arriving, []
        for result, slots, is_done in arriving:
            self._arrive(result, slots, is_done)

    def _pull_ended(self, result: PullResult) -> None:
        pull, slots = self._pulling.pop(result.request_id)
        if result.ok:
            self._arrive(result, slots, self._copies.into(runs(pull.block_ids, slots)))
        else:
            self._arrive(result, slots, lambda: True)

    def _arrive(self, result: PullResult, slots: list[int], is_done: Callable[[], bool]) -> None:
        if is_done():
            self._slots.give_back(slots)
            self._events.pulls.append(result)
        else:
            self._arriving.append((result, slots, is_done))

    def _begin_pulls(self) -> None:
        while self._waiting:
            pull = self._waiting[0]
            if len(pull.block_ids) > self._slots.num_slots:
                why = f"the pull has {len(pull.block_ids)} blocks, the staging buffer {self._slots.num_slots}"
                self._refuse(pull, "invalid", f"{why}: give more --kv-staging-bytes")
                continue
            slots = self._slots.take(len(pull.block_ids))
            if slots is None:
                return
            self._waiting.popleft()
            self._pulling[pull.request_id] = (pull, slots)
            pull.begin(slots)

    def _refuse_late(self, now: float) -> None:
        for pull in list(self._waiting):
            if now - pull.asked_at > self._pull_timeout_s:
                self._refuse(pull, "timeout", f"no room in the staging buffer within {self._pull_timeout_s:g} s")

    def _refuse(self, pull: _Pull, reason: str, message: str) -> None:
        """It never began."""
        self._waiting.remove(pull)
        logger.warning("pull_not_staged request_id=%s reason=%s message=%s", pull.request_id, reason, message)
        self._events.pulls.append(PullResult(pull.request_id, False, reason, message))
        self._wake()

"""A SidecarLink whose pulls arrive in a staging buffer: slots are found first, and copied to their blocks at the end.

A pull waits for free slots in the order of arrival; its time limit counts from when it was asked for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine_adapter.memory.slots import Run, Slots, runs
from engine_adapter.sidecar_link import SidecarLink
from sidecar.protocol import Event, PullEnded, PullSource

logger = logging.getLogger(__name__)


class CopiesIn(Protocol):
    """See device.BlockCopies."""

    def into(self, runs: Sequence[Run]) -> Callable[[], bool]: ...


@dataclass(frozen=True, slots=True)
class _Pull:
    pull_id: str
    sources: Sequence[PullSource]
    block_ids: list[int]
    first_block: int
    ends_at: float


class StagedLink:
    """What a worker needs of a SidecarLink; called on one thread."""

    def __init__(
        self, link: SidecarLink, slots: Slots, copies: CopiesIn, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._slots = slots
        self._copies = copies
        self._clock = clock
        self._waiting: deque[_Pull] = deque()
        self._pulling: dict[str, tuple[_Pull, list[int]]] = {}
        self._arriving: list[tuple[PullEnded, list[int], Callable[[], bool]]] = []
        self._never_begun: list[Event] = []

    @property
    def epoch(self) -> str:
        """See SidecarLink."""
        return self._link.epoch

    def pull(
        self,
        pull_id: str,
        sources: Sequence[PullSource],
        local_block_ids: list[int],
        first_block: int,
        deadline_s: float,
    ) -> None:
        """As SidecarLink has it; it begins when there are slots for all of it."""
        self._waiting.append(_Pull(pull_id, sources, local_block_ids, first_block, self._clock() + deadline_s))
        self._begin()

    def abandon(self, pull_id: str) -> None:
        """As SidecarLink has it; the leases of a pull that has not begun are dropped."""
        waiting = next((pull for pull in self._waiting if pull.pull_id == pull_id), None)
        if waiting is None:
            self._link.abandon(pull_id)
            return
        for source in waiting.sources:
            self._link.drop(source)
        self._refuse(waiting, "abandoned", "the engine abandoned it")

    def poll(self) -> list[Event]:
        """As SidecarLink has it; a pull that went well is told when its blocks are in place."""
        for event in self._link.poll():
            if isinstance(event, PullEnded) and event.pull_id in self._pulling:
                pull, slots = self._pulling.pop(event.pull_id)
                done = self._copies.into(runs(pull.block_ids, slots)) if event.ok else lambda: True
                self._arriving.append((event, slots, done))
            else:
                self._never_begun.append(event)
        told: list[Event] = []
        arriving, self._arriving = self._arriving, []
        for ended, slots, is_done in arriving:
            if is_done():
                self._slots.give_back(slots)
                told.append(ended)
            else:
                self._arriving.append((ended, slots, is_done))
        for pull in [pull for pull in self._waiting if self._clock() > pull.ends_at]:
            self._refuse(pull, "timeout", "no room in the staging buffer in time: give more staging_bytes")
        self._begin()
        told += self._never_begun
        self._never_begun = []
        return told

    def overdue_s(self) -> float:
        """See SidecarLink."""
        return self._link.overdue_s()

    def close(self) -> None:
        """See SidecarLink."""
        self._link.close()

    def _begin(self) -> None:
        while self._waiting:
            pull = self._waiting[0]
            if len(pull.block_ids) > self._slots.num_slots:
                why = f"the pull has {len(pull.block_ids)} blocks, the staging buffer {self._slots.num_slots} for pulls"
                self._refuse(pull, "invalid", f"{why}: give more staging_bytes")
                continue
            slots = self._slots.take(len(pull.block_ids))
            if slots is None:
                return
            self._waiting.popleft()
            self._pulling[pull.pull_id] = (pull, slots)
            left_s = max(0.0, pull.ends_at - self._clock())
            self._link.pull(pull.pull_id, pull.sources, slots, pull.first_block, left_s)

    def _refuse(self, pull: _Pull, reason: str, message: str) -> None:
        self._waiting.remove(pull)
        first = pull.sources[0]
        peer = f"{first.engine_id}@{first.host}:{first.port}"
        self._never_begun.append(PullEnded(pull.pull_id, False, reason, message, 0, 0, 0.0, "", peer))

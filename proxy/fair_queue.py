"""Who is next: a bounded queue that is fair between API keys, by the work they ask for, within one priority.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): a ticket's tag is the larger of the queue's virtual time and the
end of its key's last ticket; the smallest tag goes first, and the queue's virtual time is the tag last taken. So a key
that floods the queue waits behind itself, not before others. A smaller `priority` goes first, as in vLLM. Pure.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Ticket(Generic[ItemT]):
    """A place in the queue. `item` is the caller's, `cost` in any unit as long as it is always the same one."""

    __slots__ = ("_order", "cost", "item", "key", "left", "priority", "tag")

    def __init__(self, key: bytes, priority: int, cost: float, tag: float, order: int, item: ItemT) -> None:
        self.key = key
        self.priority = priority
        self.cost = cost
        self.tag = tag
        self.item = item
        self.left = False
        self._order = order

    def __lt__(self, other: Ticket[ItemT]) -> bool:
        return (self.priority, self.tag, self._order) < (other.priority, other.tag, other._order)


class FairQueue(Generic[ItemT]):
    def __init__(self) -> None:
        self._heap: list[Ticket[ItemT]] = []
        self._num_waiting = 0
        self._now = 0.0  # virtual time
        self._key_ends: dict[bytes, float] = {}  # of keys with a ticket that ends after now
        self._order = itertools.count()

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, key: bytes, priority: int, cost: float, item: ItemT) -> Ticket[ItemT]:
        tag = max(self._now, self._key_ends.get(key, 0.0))
        self._key_ends[key] = tag + cost
        ticket = Ticket(key, priority, cost, tag, next(self._order), item)
        heapq.heappush(self._heap, ticket)
        self._num_waiting += 1
        return ticket

    def first(self) -> Ticket[ItemT] | None:
        """Whose turn it is; the ticket stays until `leave`."""
        while self._heap and self._heap[0].left:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def leave(self, ticket: Ticket[ItemT], *, served: bool) -> None:
        """Give the place up; further calls do nothing. Work not served is taken off its key's account."""
        if ticket.left:
            return
        ticket.left = True
        self._num_waiting -= 1
        if served:
            self._now = max(self._now, ticket.tag)
        elif ticket.key in self._key_ends:
            self._key_ends[ticket.key] -= ticket.cost
        if not self._num_waiting:
            self._heap.clear()
            self._key_ends.clear()
            self._now = 0.0
        elif len(self._key_ends) > 2 * len(self._heap) + 16:
            self._key_ends = {key: end for key, end in self._key_ends.items() if end > self._now}
        if len(self._heap) > 2 * self._num_waiting + 16:
            self._heap = [one for one in self._heap if not one.left]
            heapq.heapify(self._heap)

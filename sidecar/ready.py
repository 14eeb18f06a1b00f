"""How much of a lease is computed while its producer still computes, and which bytes that is. Pure.

A prompt is computed strip by strip (a chunk of a chunked prefill), and within a strip layer by layer. So one mark says
it all: blocks [0, first_block) have all their layers, blocks [first_block, end_block) the first `num_layers` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from sidecar.errors import Refusal
from sidecar.layout import KvLayout, Plane
from sidecar.spans import Destination, Spans

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Part = tuple[int, int, int, int]
"""Blocks [first, end) of a lease, and of them the layers [first, end)."""


class Ready(msgspec.Struct, frozen=True):
    """A mark; it only grows. With `num_layers` 0 the strip counts for nothing."""

    first_block: Count = 0
    end_block: Count = 0
    num_layers: Count = 0


def mark_fault(mark: Ready, num_blocks: int, num_layers: int) -> str:
    """Why `mark` is none for a lease of `num_blocks`; "" if it is one."""
    if not mark.first_block <= mark.end_block <= num_blocks:
        return f"blocks {mark.first_block} to {mark.end_block} are said to be computed, of {num_blocks}"
    if mark.num_layers > num_layers:
        return f"{mark.num_layers} layers are said to be computed, of {num_layers}"
    return ""


def normal(mark: Ready, num_layers: int) -> Ready:
    """The one mark that says the same without an empty or a full strip."""
    if mark.num_layers == num_layers:
        return Ready(mark.end_block, mark.end_block, 0)
    return mark if mark.num_layers and mark.first_block < mark.end_block else Ready(mark.first_block, mark.first_block)


def follows(old: Ready, new: Ready) -> bool:
    """Whether `new` holds all of `old`, in the same strip or in a later one; both `normal`."""
    if new.first_block == old.first_block:
        return new.end_block >= old.end_block and new.num_layers >= old.num_layers
    return new.first_block >= old.end_block


def likely_next(before: Ready, now: Ready, num_layers: int) -> Ready | None:
    """The mark after `now`, which came after `before`, if the strip goes on at its pace; None at a strip's end."""
    if not now.num_layers:
        return None
    pace = now.num_layers - (before.num_layers if before.first_block == now.first_block else 0)
    ready = Ready(now.first_block, now.end_block, min(num_layers, now.num_layers + max(1, pace)))
    return normal(ready, num_layers)


def parts_between(old: Ready, new: Ready, num_layers: int, first_wanted: int = 0) -> list[Part]:
    """What `new` has and `old`, which it follows, has not, from block `first_wanted` on; no two overlap."""
    if new.first_block == old.first_block:
        parts = [
            (old.first_block, old.end_block, old.num_layers, new.num_layers),
            (old.end_block, new.end_block, 0, new.num_layers),
        ]
    else:
        parts = [
            (old.first_block, old.end_block, old.num_layers, num_layers),
            (old.end_block, new.first_block, 0, num_layers),
            (new.first_block, new.end_block, 0, new.num_layers),
        ]
    clipped = [(max(first, first_wanted), end, low, high) for first, end, low, high in parts]
    return [part for part in clipped if part[0] < part[1] and part[2] < part[3]]


def has_layers(layout: KvLayout) -> bool:
    """Whether a layer's share of a block can be told: planes of one layer each, in order, or one plane of all."""
    planes = layout.planes
    if len(planes) == 1:
        return layout.order.startswith("block,layer,") and planes[0].block_bytes % layout.num_layers == 0
    return len(planes) % layout.num_layers == 0


def of_layers(layout: KvLayout, first: int, end: int) -> KvLayout:
    """The same pool with the layers [first, end) only; `has_layers` must be true of it."""
    if (first, end) == (0, layout.num_layers):
        return layout
    if len(layout.planes) == 1:
        plane = layout.planes[0]
        size = plane.block_bytes // layout.num_layers
        planes: tuple[Plane, ...] = (Plane(plane.offset + first * size, plane.stride_bytes, (end - first) * size),)
    else:
        each = len(layout.planes) // layout.num_layers
        planes = layout.planes[first * each : end * each]
    return msgspec.structs.replace(layout, planes=planes)


def plan_parts(
    parts: Sequence[Part],
    producer: KvLayout,
    remote_block_ids: Sequence[int],
    consumer: KvLayout,
    local_block_ids: Sequence[int],
    first_block: int,
) -> Spans:
    """Spans of these parts; local_block_ids[i] receives block first_block + i. Raises Refusal("invalid")."""
    remote: list[int] = []
    local: list[int] = []
    lengths: list[int] = []
    for first, end, low, high in parts:
        theirs = remote_block_ids[first:end]
        ours = local_block_ids[first - first_block : end - first_block]
        if not len(theirs) == len(ours) == end - first:
            raise Refusal("invalid", f"blocks {first} to {end} are not all of this transfer")
        spans = Destination(of_layers(consumer, low, high), ours).plan(of_layers(producer, low, high), theirs)
        remote += spans.remote
        local += spans.local
        lengths += spans.lengths
    return Spans(remote, local, lengths)


def as_copied(mark: Ready, layout: KvLayout) -> Ready:
    """`mark`, normal, as far as it can be copied: where layers can't be told, a strip counts once it has them all."""
    mark = normal(mark, layout.num_layers)
    return mark if has_layers(layout) else Ready(mark.first_block, mark.first_block)


class PartPlans:
    """What to copy of a lease as its marks come. `copied`: as far as it has been given out."""

    def __init__(
        self, producer: KvLayout, consumer: KvLayout, local_block_ids: Sequence[int], first_block: int
    ) -> None:
        """local_block_ids[i] receives block first_block + i."""
        self.copied = Ready()
        self._producer = producer
        self._consumer = consumer
        self._local = local_block_ids
        self._first_block = first_block
        self._likely: Ready | None = None
        self._ahead: Spans | None = None

    def checked(self, mark: Ready, has_blocks: int) -> Ready:
        """A peer's mark as far as it can be copied. Raises Refusal("transport") where it makes no sense."""
        fault = mark_fault(mark, has_blocks, self._producer.num_layers)
        now = as_copied(mark, self._producer)
        if fault or not follows(self.copied, now):
            raise Refusal("transport", fault or f"the producer said {now} after {self.copied}")
        return now

    def take(self, now: Ready, block_ids: Sequence[int]) -> Spans:
        """What `now`, checked, has beyond `copied`. Raises Refusal("invalid")."""
        spans = self._ahead if self._ahead is not None and now == self._likely else self._plan(now, block_ids)
        self._likely, self._ahead = likely_next(self.copied, now, self._producer.num_layers), None
        self.copied = now
        return spans

    def look_ahead(self, block_ids: Sequence[int]) -> None:
        """Plan what the next mark most likely brings, so that its copy begins at once. Raises Refusal("invalid")."""
        if self._likely is not None and self._ahead is None:
            self._ahead = self._plan(self._likely, block_ids)

    def _plan(self, mark: Ready, block_ids: Sequence[int]) -> Spans:
        parts = parts_between(self.copied, mark, self._consumer.num_layers, self._first_block)
        return plan_parts(parts, self._producer, block_ids, self._consumer, self._local, self._first_block)

"""Between engines cut up differently: which ranks a rank reads from, and which of their bytes go where. Pure.

A rank holds some KV heads of some layers (see KvLayout). A consumer's rank reads, from each producer's rank that it
needs, the heads, layers and tokens that both hold; where several ranks hold the same, one of them, so that the
consumer's ranks, and one request after the other, spread over all of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from operator import sub

import numpy as np

from sidecar.errors import Refusal
from sidecar.layout import KvLayout, Plane, rank_heads, same_shape
from sidecar.spans import Spans, id_fault

Held = tuple[range, range]
"""Layers and KV heads."""


@dataclass(frozen=True, slots=True)
class Source:
    """A producer's rank to read from, by its place in the list of ranks; we are reader `reader` of `num_readers`."""

    rank: int
    reader: int
    num_readers: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What one consumer's rank reads. `unread` are ranks that no rank reads and that this one is to let go."""

    sources: tuple[Source, ...]
    unread: tuple[int, ...] = ()


_ONLY = Selection((Source(0, 0, 1),))


def select_sources(consumer: KvLayout, num_producers: int, stage_layers: tuple[int, ...], turn: int) -> Selection:
    """Choose among a producer's ranks, given stage by stage; `stage_layers` as in KvLayout.

    Every rank of the consumer that is given the same `turn` comes to a choice that fits the others'. Raises
    Refusal("incompatible") where the producer's ranks don't make up the model.
    """
    if num_producers == 1 and consumer.tp_size == 1 and len(consumer.stage_layers) < 2:
        return _ONLY
    heads, num_layers = consumer.model_heads, consumer.layers.stop
    ours = consumer.stage_layers or (num_layers,)
    theirs = stage_layers or (sum(ours),)
    tp_size, left = divmod(num_producers, len(theirs))
    if left or not tp_size or (heads % tp_size and tp_size % heads):
        raise Refusal(
            "incompatible",
            f"the producer has {num_producers} ranks in {len(theirs)} stages, which can't hold {heads} KV heads",
        )
    if sum(theirs) != sum(ours):
        raise Refusal("incompatible", f"the producer has {sum(theirs)} layers, this engine {sum(ours)}")
    rank = consumer.pp_rank * consumer.tp_size + consumer.tp_rank
    replicas = max(1, tp_size // heads)
    if max(1, consumer.tp_size // heads) >= replicas:
        turn = 0  # every replica is read anyway, and equal ranks read from each other
    return _select(rank, consumer.tp_size, ours, tp_size, theirs, heads, turn % replicas)


@lru_cache(maxsize=1024)
def _select(
    rank: int, our_tp: int, our_stages: tuple[int, ...], their_tp: int, their_stages: tuple[int, ...], heads: int,
    turn: int,
) -> Selection:  # fmt: skip
    producers = _holdings(their_tp, their_stages, heads)
    replicas = max(1, their_tp // heads)
    chosen: list[list[int]] = []
    for index, wanted in enumerate(_holdings(our_tp, our_stages, heads)):
        replica = (index % our_tp + turn) % replicas
        chosen.append(
            [place for place, held in enumerate(producers) if place % replicas == replica and _overlap(held, wanted)]
        )
    readers: list[list[int]] = [[] for _ in producers]
    for index, places in enumerate(chosen):
        for place in places:
            readers[place].append(index)
    sources = (Source(place, readers[place].index(rank), len(readers[place])) for place in chosen[rank])
    unread = [place for place, reading in enumerate(readers) if not reading]
    return Selection(tuple(sources), tuple(unread[rank :: len(chosen)]))


def _holdings(tp_size: int, stage_layers: Sequence[int], heads: int) -> list[Held]:
    """What each rank of an engine holds, stage by stage."""
    ends = [sum(stage_layers[: stage + 1]) for stage in range(len(stage_layers))]
    stages = [range(end - size, end) for end, size in zip(ends, stage_layers, strict=True)]
    return [(layers, rank_heads(tp_rank, tp_size, heads)) for layers in stages for tp_rank in range(tp_size)]


def _overlap(one: Held, other: Held) -> bool:
    return all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True, slots=True)
class PlanePieces:
    """The pieces of one unit of tokens in a pair of planes, each of `length` bytes, relative to the unit's place.

    Unit u lies in the producer's block u // k at `remote_unit` * (u % k), where k is how many units a block has.
    """

    theirs: Plane
    ours: Plane
    remote_unit: int
    local_unit: int
    remote: tuple[int, ...]
    local: tuple[int, ...]
    length: int


class PackedSpans(Spans):
    """Spans whose columns are arrays: of many small ones even a glance at each is too slow."""

    __slots__ = ()

    @property
    def num_bytes(self) -> int:
        return int(np.asarray(self.lengths).sum())

    def surely_within(self, remote_bytes: int, local_bytes: int) -> bool:
        remote, local, lengths = np.asarray(self.remote), np.asarray(self.local), np.asarray(self.lengths)
        longest = int(lengths.max())
        return bool(
            lengths.min() >= 1
            and remote.min() >= 0
            and local.min() >= 0
            and remote.max() + longest <= remote_bytes
            and local.max() + longest <= local_bytes
        )


class Reshard:
    """How blocks of `consumer` are put together from blocks of `producer`, which match (see layout.mismatch)."""

    def __init__(self, producer: KvLayout, consumer: KvLayout) -> None:
        self._producer = producer
        self._consumer = consumer
        self.unit_tokens = min(producer.block_size, consumer.block_size)
        self.planes = tuple(
            _pieces(producer, consumer, theirs, ours, self.unit_tokens)
            for theirs, ours in _plane_pairs(producer, consumer)
        )

    def pieces(self, num_blocks: int) -> int:
        """How many pieces so many of the consumer's blocks are put together from, before neighbours are joined."""
        units = num_blocks * self._consumer.block_size // self.unit_tokens
        return units * sum(len(plane.remote) for plane in self.planes)

    def plan(self, lease_block_ids: Sequence[int], local_block_ids: Sequence[int], first_block: int) -> Spans:
        """Spans that fill local_block_ids[i] with the tokens of the consumer's block number first_block + i.

        The last block is filled as far as the lease reaches. Raises Refusal("invalid").
        """
        self._check(lease_block_ids, local_block_ids, first_block)
        ours_per = self._consumer.block_size // self.unit_tokens
        theirs_per = self._producer.block_size // self.unit_tokens
        first = first_block * ours_per
        units = range(first, min(first + len(local_block_ids) * ours_per, len(lease_block_ids) * theirs_per))
        theirs = [(lease_block_ids[unit // theirs_per], unit % theirs_per) for unit in units]
        ours = [(local_block_ids[(unit - first) // ours_per], unit % ours_per) for unit in units]
        remote, local, lengths = array("q"), array("q"), array("q")
        for plane in self.planes:
            from_at = _places(plane.theirs, plane.remote_unit, theirs)
            to_at = _places(plane.ours, plane.local_unit, ours)
            if len(plane.remote) == 1:
                _join(from_at, to_at, plane, remote, local, lengths)
            else:
                remote.frombytes(np.add.outer(np.array(from_at, np.int64), np.array(plane.remote, np.int64)).tobytes())
                local.frombytes(np.add.outer(np.array(to_at, np.int64), np.array(plane.local, np.int64)).tobytes())
                lengths.extend(array("q", [plane.length]) * (len(from_at) * len(plane.remote)))
        return PackedSpans(remote, local, lengths)

    def _check(self, lease: Sequence[int], local: Sequence[int], first_block: int) -> None:
        fault = id_fault("the producer's", lease, self._producer.num_blocks)
        fault = fault or id_fault("the consumer's", local, self._consumer.num_blocks)
        if len(set(local)) != len(local):
            fault = fault or "a local block id occurs twice: two blocks would be written over each other"
        has = len(lease) * self._producer.block_size
        if local and (first_block + len(local) - 1) * self._consumer.block_size >= has:
            fault = fault or (
                f"blocks {first_block} to {first_block + len(local)} of {self._consumer.block_size} tokens were asked "
                f"for, the lease has {has} tokens"
            )
        if fault:
            raise Refusal("invalid", fault)


def reshard_between(producer: KvLayout, consumer: KvLayout) -> Reshard | None:
    """None where blocks are copied whole."""
    return None if same_shape(producer, consumer) else Reshard(producer, consumer)


def _plane_pairs(producer: KvLayout, consumer: KvLayout) -> list[tuple[Plane, Plane]]:
    if "layer" in producer.axes or producer.layers == consumer.layers:
        return list(zip(producer.planes, consumer.planes, strict=True))
    each = len(producer.planes) // producer.num_layers
    pairs: list[tuple[Plane, Plane]] = []
    for layer in _common(producer.layers, consumer.layers):
        theirs, ours = (layer - layout.layers.start for layout in (producer, consumer))
        pairs += zip(
            producer.planes[theirs * each : (theirs + 1) * each],
            consumer.planes[ours * each : (ours + 1) * each],
            strict=True,
        )
    return pairs


def _pieces(producer: KvLayout, consumer: KvLayout, theirs: Plane, ours: Plane, unit_tokens: int) -> PlanePieces:
    their_steps, length = _steps(producer, theirs)
    our_steps, _ = _steps(consumer, ours)
    common = {"head": _common(producer.heads, consumer.heads), "layer": _common(producer.layers, consumer.layers)}
    loops: list[tuple[int, int, int]] = []
    remote_at = local_at = 0
    for axis, size in zip(producer.axes, producer.axis_sizes, strict=True):
        count = unit_tokens if axis == "token" else size
        if axis in common:
            count = len(common[axis])
            remote_at += (common[axis].start - getattr(producer, axis + "s").start) * their_steps[axis]
            local_at += (common[axis].start - getattr(consumer, axis + "s").start) * our_steps[axis]
        loops.append((count, their_steps[axis], our_steps[axis]))
    loops, length = _collapse(loops, length)
    remote, local = (
        tuple(at + sum(steps) for steps in product(*(range(0, loop[0] * loop[side], loop[side]) for loop in loops)))
        for side, at in ((1, remote_at), (2, local_at))
    )
    units = [steps.get("token", 0) * unit_tokens for steps in (their_steps, our_steps)]
    return PlanePieces(theirs, ours, units[0], units[1], remote, local, length)


def _steps(layout: KvLayout, plane: Plane) -> tuple[dict[str, int], int]:
    """Bytes from one to the next along each axis of a block, and bytes of a cell."""
    step = plane.block_bytes
    steps: dict[str, int] = {}
    for axis, size in zip(layout.axes, layout.axis_sizes, strict=True):
        step //= size
        steps[axis] = step
    return steps, step


def _collapse(loops: list[tuple[int, int, int]], length: int) -> tuple[list[tuple[int, int, int]], int]:
    """Grow the piece along every axis that goes on where the piece ends, in both pools."""
    loops = [loop for loop in loops if loop[0] > 1]
    while (inner := next((loop for loop in loops if loop[1] == loop[2] == length), None)) is not None:
        loops.remove(inner)
        length *= inner[0]
    return loops, length


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _places(plane: Plane, unit_bytes: int, units: list[tuple[int, int]]) -> list[int]:
    offset, stride = plane.offset, plane.stride_bytes
    return [offset + stride * block_id + unit_bytes * index for block_id, index in units]


def _join(
    from_at: list[int], to_at: list[int], plane: PlanePieces,
    remote: array[int], local: array[int], lengths: array[int],
) -> None:  # fmt: skip
    """One piece a unit: those that follow each other in both pools are one span."""
    if not from_at:
        return
    length = plane.length
    steps = zip(map(sub, from_at[1:], from_at), map(sub, to_at[1:], to_at), strict=True)
    breaks = (index for index, (theirs, ours) in enumerate(steps, 1) if theirs != length or ours != length)
    starts = [0, *breaks]
    remote.extend([from_at[start] + plane.remote[0] for start in starts])
    local.extend([to_at[start] + plane.local[0] for start in starts])
    lengths.extend([(end - start) * length for start, end in pairwise([*starts, len(from_at)])])

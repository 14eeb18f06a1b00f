"""From block ids to spans: the contiguous byte ranges a transfer copies. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import sub

from sidecar.errors import Refusal
from sidecar.layout import KvLayout

Span = tuple[int, int, int]
"""(offset in the producer's pool, offset in the consumer's pool, bytes)."""


class Spans:
    """Spans in columns, so that thousands are planned, checked and copied without a step of Python for each."""

    __slots__ = ("each", "ends", "lengths", "local", "remote")

    def __init__(
        self, remote: Sequence[int], local: Sequence[int], lengths: Sequence[int], each: int = 0,
        ends: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        """`each`, if not 0: the bytes of every one, and `ends` where the last of either side ends, from checked ids."""
        self.remote = remote
        self.local = local
        self.lengths = lengths
        self.each = each
        self.ends = ends

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Span]:
        return zip(self.remote, self.local, self.lengths, strict=True)

    def __eq__(self, other: object) -> bool:
        return list(self) == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_bytes(self) -> int:
        return self.each * len(self.lengths) if self.each else sum(self.lengths)

    def part(self, first: int, end: int) -> Spans:
        """Those from number `first` to before `end`."""
        return Spans(self.remote[first:end], self.local[first:end], self.lengths[first:end])

    def surely_within(self, remote_bytes: int, local_bytes: int) -> bool:
        """Whether the longest span would fit at the last offset of either side, and so every one does."""
        if self.each:
            return self.ends[0] <= remote_bytes and self.ends[1] <= local_bytes
        longest = max(self.lengths)
        return (
            min(self.lengths) >= 1
            and min(self.remote) >= 0
            and min(self.local) >= 0
            and max(self.remote) + longest <= remote_bytes
            and max(self.local) + longest <= local_bytes
        )


class Destination:
    """The consumer's half of a plan, worked out while the claim is on its way; a `fault` is said by `plan`."""

    __slots__ = ("block_ids", "fault", "layout", "offsets")

    def __init__(self, layout: KvLayout, block_ids: Sequence[int]) -> None:
        self.layout = layout
        self.block_ids = block_ids
        self.fault = id_fault("the consumer's", block_ids, layout.num_blocks)
        if len(set(block_ids)) != len(block_ids):
            self.fault = self.fault or "a local block id occurs twice: two blocks would be written over each other"
        self.offsets = [_offsets(plane.offset, plane.stride_bytes, block_ids) for plane in layout.planes]

    def plan(self, producer: KvLayout, remote_block_ids: Sequence[int]) -> Spans:
        """Spans that copy block remote_block_ids[i] to our i-th block, neighbours joined. Raises Refusal("invalid")."""
        if fault := self.fault or id_fault("the producer's", remote_block_ids, producer.num_blocks):
            raise Refusal("invalid", fault)
        starts, run_blocks = _runs(remote_block_ids, self.block_ids)
        if not starts and len(producer.planes) == 1 and remote_block_ids:
            (theirs,), (to,) = producer.planes, self.offsets
            size, remote = theirs.block_bytes, _offsets(theirs.offset, theirs.stride_bytes, remote_block_ids)
            ends = theirs.offset + theirs.stride_bytes * max(remote_block_ids) + size, max(to) + size
            return Spans(remote, to, [size] * len(to), size, ends)
        return self._plan_planes(producer, remote_block_ids, starts, run_blocks)

    def _plan_planes(
        self, producer: KvLayout, remote_block_ids: Sequence[int], starts: list[int], run_blocks: list[int]
    ) -> Spans:
        remote: list[int] = []
        local: list[int] = []
        lengths: list[int] = []
        for theirs, ours, offsets in zip(producer.planes, self.layout.planes, self.offsets, strict=True):
            size = theirs.block_bytes
            if starts and theirs.stride_bytes == size and ours.stride_bytes == size:
                remote += _offsets(theirs.offset, size, [remote_block_ids[i] for i in starts])
                local += [offsets[i] for i in starts]
                lengths += [blocks * size for blocks in run_blocks]
            else:
                remote += _offsets(theirs.offset, theirs.stride_bytes, remote_block_ids)
                local += offsets
                lengths += [size] * len(offsets)
        return Spans(remote, local, lengths)


def plan_spans(
    producer: KvLayout, remote_block_ids: Sequence[int], consumer: KvLayout, local_block_ids: Sequence[int]
) -> Spans:
    """Spans that copy block remote_block_ids[i] to block local_block_ids[i], neighbours joined.

    Raises Refusal("invalid") if a block id lies outside its pool or a local block would be written twice.
    """
    return Destination(consumer, local_block_ids).plan(producer, remote_block_ids)


def check_spans(spans: Spans | Sequence[Span], remote_bytes: int, local_bytes: int) -> None:
    """Raise Refusal("invalid") if any span leaves the `remote_bytes` or `local_bytes` that are registered."""
    if isinstance(spans, Spans) and (not spans or spans.surely_within(remote_bytes, local_bytes)):
        return
    for remote, local, length in spans:
        if length < 1 or remote < 0 or local < 0 or remote + length > remote_bytes or local + length > local_bytes:
            raise Refusal(
                "invalid",
                f"the span of {length} bytes from {remote} to {local} leaves a registered region "
                f"(producer {remote_bytes} bytes, consumer {local_bytes} bytes)",
            )


def id_fault(whose: str, block_ids: Sequence[int], num_blocks: int) -> str:
    """Why `block_ids` are not all in a pool; "" if they are."""
    if block_ids and (min(block_ids) < 0 or max(block_ids) >= num_blocks):
        return f"{whose} block ids reach from {min(block_ids)} to {max(block_ids)}, its pool has {num_blocks}"
    return ""


def _offsets(first: int, stride: int, block_ids: Sequence[int]) -> list[int]:
    if first == 0:
        return [stride * block_id for block_id in block_ids]
    return [first + stride * block_id for block_id in block_ids]


def _runs(remote: Sequence[int], local: Sequence[int]) -> tuple[list[int], list[int]]:
    """First index and blocks of each longest run that rises by one on both sides; nothing if all have one block."""
    if 1 not in map(sub, remote[1:], remote):
        return [], []
    steps = zip(map(sub, remote[1:], remote), map(sub, local[1:], local), strict=True)
    starts = [0, *(index for index, (theirs, ours) in enumerate(steps, 1) if theirs != 1 or ours != 1)]
    if len(starts) == len(remote):
        return [], []
    return starts, list(map(sub, [*starts[1:], len(remote)], starts))

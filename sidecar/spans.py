"""From block ids to spans: the contiguous byte ranges a transfer copies. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.errors import Refusal
from sidecar.layout import KvLayout

Span = tuple[int, int, int]
"""(offset in the producer's pool, offset in the consumer's pool, bytes)."""


def plan_spans(
    producer: KvLayout, remote_block_ids: Sequence[int], consumer: KvLayout, local_block_ids: Sequence[int]
) -> list[Span]:
    """Spans that copy block remote_block_ids[i] to block local_block_ids[i], neighbours joined.

    Raises Refusal("invalid") if a block id lies outside its pool or a local block would be written twice.
    """
    _check_ids("the producer's", remote_block_ids, producer.num_blocks)
    _check_ids("the consumer's", local_block_ids, consumer.num_blocks)
    if len(set(local_block_ids)) != len(local_block_ids):
        raise Refusal("invalid", "a local block id occurs twice: two blocks would be written over each other")
    runs = _runs(remote_block_ids, local_block_ids)
    spans: list[Span] = []
    for theirs, ours in zip(producer.planes, consumer.planes, strict=True):
        size = theirs.block_bytes
        if theirs.stride_bytes == size and ours.stride_bytes == size:
            spans += [(theirs.offset + r * size, ours.offset + c * size, n * size) for r, c, n in runs]
        else:
            spans += [
                (theirs.offset + (r + k) * theirs.stride_bytes, ours.offset + (c + k) * ours.stride_bytes, size)
                for r, c, n in runs
                for k in range(n)
            ]
    return spans


def check_spans(spans: Sequence[Span], remote_bytes: int, local_bytes: int) -> None:
    """Raise Refusal("invalid") if any span leaves the `remote_bytes` or `local_bytes` that are registered."""
    for remote, local, length in spans:
        if length < 1 or remote < 0 or local < 0 or remote + length > remote_bytes or local + length > local_bytes:
            raise Refusal(
                "invalid",
                f"the span of {length} bytes from {remote} to {local} leaves a registered region "
                f"(producer {remote_bytes} bytes, consumer {local_bytes} bytes)",
            )


def _check_ids(whose: str, block_ids: Sequence[int], num_blocks: int) -> None:
    if block_ids and (min(block_ids) < 0 or max(block_ids) >= num_blocks):
        raise Refusal(
            "invalid", f"{whose} block ids reach from {min(block_ids)} to {max(block_ids)}, its pool has {num_blocks}"
        )


def _runs(remote: Sequence[int], local: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first remote block, first local block, blocks): maximal runs that rise by one on both sides."""
    if not remote:
        return []
    steps = zip(remote, remote[1:], local, local[1:], strict=False)
    starts = [index for index, (r, s, c, d) in enumerate(steps, 1) if s != r + 1 or d != c + 1]
    if len(starts) == len(remote) - 1:
        return [(r, c, 1) for r, c in zip(remote, local, strict=True)]
    ends = [*starts, len(remote)]
    return [(remote[a], local[a], b - a) for a, b in zip([0, *starts], ends, strict=True)]

from __future__ import annotations

import random

import pytest

from sidecar.errors import Refusal
from sidecar.layout import KvLayout, Plane
from sidecar.spans import check_spans, plan_spans


def layout(num_blocks: int, *planes: Plane) -> KvLayout:
    return KvLayout(num_blocks, 16, planes, 1, 1, 1, "float32", "m", "o")


DENSE = layout(64, Plane(0, 8, 8), Plane(512, 4, 4))
GAPPED = layout(32, Plane(100, 10, 8), Plane(500, 4, 4))


@pytest.mark.parametrize(("producer", "consumer"), [(DENSE, DENSE), (DENSE, GAPPED), (GAPPED, DENSE), (GAPPED, GAPPED)])
@pytest.mark.parametrize("seed", range(8))
def test_spans_copy_what_a_brute_force_gather_copies(producer: KvLayout, consumer: KvLayout, seed: int) -> None:
    dice = random.Random(seed)
    count = dice.randint(0, 32)
    first = dice.randint(0, producer.num_blocks - count)
    remote = list(range(first, first + count)) if seed % 2 else dice.sample(range(producer.num_blocks), count)
    local = sorted(dice.sample(range(consumer.num_blocks), count))
    pool = dice.randbytes(producer.pool_bytes)
    copied, expected = bytearray(consumer.pool_bytes), bytearray(consumer.pool_bytes)
    spans = plan_spans(producer, remote, consumer, local)
    check_spans(spans, producer.pool_bytes, consumer.pool_bytes)
    for start, to, length in spans:
        copied[to : to + length] = pool[start : start + length]
    for theirs, ours in zip(producer.planes, consumer.planes, strict=True):
        for r, c in zip(remote, local, strict=True):
            for byte in range(theirs.block_bytes):
                expected[ours.offset + c * ours.stride_bytes + byte] = pool[
                    theirs.offset + r * theirs.stride_bytes + byte
                ]
    assert copied == expected


def test_neighbours_on_both_sides_are_one_span() -> None:
    one_plane = layout(64, Plane(0, 8, 8))
    assert plan_spans(one_plane, [3, 4, 5, 9, 10], one_plane, [0, 1, 2, 3, 4]) == [(24, 0, 24), (72, 24, 16)]
    assert plan_spans(one_plane, [5, 4], one_plane, [0, 1]) == [(40, 0, 8), (32, 8, 8)]
    assert plan_spans(one_plane, [], one_plane, []) == []


@pytest.mark.parametrize(
    ("remote", "local", "said"),
    [
        ([64], [0], "the producer's block ids reach from 64 to 64, its pool has 64"),
        ([-1], [0], "the producer's"),
        ([0], [64], "the consumer's"),
        ([0], [-1], "the consumer's"),
        ([0, 1], [2, 2], "twice"),
    ],
)
def test_ids_outside_a_pool_are_refused(remote: list[int], local: list[int], said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        plan_spans(DENSE, remote, DENSE, local)
    assert refused.value.reason == "invalid"


def test_the_same_source_block_may_go_to_two_places() -> None:
    assert plan_spans(layout(4, Plane(0, 8, 8)), [1, 1], layout(4, Plane(0, 8, 8)), [2, 3]) == [(8, 16, 8), (8, 24, 8)]


@pytest.mark.parametrize("span", [(-1, 0, 1), (0, -1, 1), (0, 0, 0), (93, 0, 8), (0, 43, 8), (0, 0, 1 << 62)])
def test_a_span_outside_a_region_is_refused(span: tuple[int, int, int]) -> None:
    check_spans([(92, 42, 8)], 100, 50)
    with pytest.raises(Refusal, match="leaves a registered region"):
        check_spans([(0, 0, 1), span], 100, 50)

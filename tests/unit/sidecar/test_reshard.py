"""The map between two parallel layouts, against a gather that knows nothing of strides.

Every rank's pool holds, cell by cell, the number of what lies there (layer, key or value, token, head, cell). What a
consumer's rank has put together from the spans must be what its own layout says belongs there.
"""

from __future__ import annotations

import itertools
import random
from functools import lru_cache

import msgspec
import numpy as np
import pytest

from sidecar.errors import Refusal
from sidecar.layout import KvLayout, Plane, mismatch
from sidecar.reshard import Selection, Source, reshard_between, select_sources
from sidecar.spans import Spans, check_spans, plan_spans
from tests.unit.sidecar.cut_layouts import (
    CELLS,
    HEAD_MAJOR,
    MIXED,
    NUM_TOKENS,
    TOKEN_MAJOR,
    WHOLE_POOL,
    Numbers,
    content,
    rank_layout,
)


def degrees(heads: int) -> list[int]:
    """Tensor-parallel sizes up to 16 that `heads` can be dealt to."""
    return [tp for tp in range(1, 17) if heads % tp == 0 or tp % heads == 0]


def block_ids_of(layout: KvLayout, seed: int) -> list[int]:
    wanted = NUM_TOKENS // layout.block_size
    return random.Random(seed).sample(range(layout.num_blocks), wanted) if seed % 3 else list(range(1, 1 + wanted))


@lru_cache(maxsize=4096)
def pool_of(layout: KvLayout, seed: int) -> Numbers:
    pool = np.zeros(layout.pool_bytes, np.int64)
    where, what = content(layout, block_ids_of(layout, seed))
    pool[where] = what
    return pool


def expand(starts: list[int], lengths: list[int]) -> Numbers:
    """Every number's place in spans."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(np.array(starts) - (ends - lengths), lengths)


def check_pair(producers: list[KvLayout], consumers: list[KvLayout], seed: int = 0) -> None:
    """Every consumer's rank gets all of its own, nothing twice, and every lease has as many readers as it is told."""
    reads: dict[int, list[Source]] = {}
    let_go: list[int] = []
    theirs_at, ours_at = block_ids_of(producers[0], seed), block_ids_of(consumers[0], seed + 1)
    for consumer in consumers:
        selection = select_sources(consumer, len(producers), producers[0].stage_layers, seed)
        got = np.zeros(consumer.pool_bytes, np.int64)
        for source in selection.sources:
            producer = producers[source.rank]
            reads.setdefault(source.rank, []).append(source)
            assert not mismatch(producer, consumer)
            spans = _plan(producer, theirs_at, consumer, ours_at)
            check_spans(spans, producer.pool_bytes, consumer.pool_bytes)
            to = expand(list(spans.local), list(spans.lengths))
            assert not got[to].any()
            got[to] = pool_of(producer, seed)[expand(list(spans.remote), list(spans.lengths))]
        let_go += selection.unread
        where, what = content(consumer, ours_at)
        assert (got[where] == what).all()
        assert np.count_nonzero(got) == what.size
    assert sorted(let_go + list(reads)) == list(range(len(producers)))
    for readers in reads.values():
        assert sorted(reader.reader for reader in readers) == list(range(len(readers)))
        assert {reader.num_readers for reader in readers} == {len(readers)}


def _plan(producer: KvLayout, lease: list[int], consumer: KvLayout, local: list[int]) -> Spans:
    reshard = reshard_between(producer, consumer)
    return plan_spans(producer, lease, consumer, local) if reshard is None else reshard.plan(lease, local, 0)


ORDERS = list(itertools.product((TOKEN_MAJOR, HEAD_MAJOR), repeat=2))
BLOCK_SIZES = [(4, 4), (2, 4), (8, 2)]


@pytest.mark.parametrize("heads", range(1, 17))
def test_every_tensor_parallel_size_onto_every_other(heads: int) -> None:
    """A single head stands for MLA's latent too: every rank holds it."""
    for number, (theirs, ours) in enumerate(itertools.product(degrees(heads), repeat=2)):
        for (their_axes, our_axes), (their_block, our_block) in itertools.product(ORDERS, BLOCK_SIZES):
            check_pair(
                [rank_layout(their_axes, their_block, heads, theirs, rank) for rank in range(theirs)],
                [rank_layout(our_axes, our_block, heads, ours, rank) for rank in range(ours)],
                seed=number,
            )


STAGES = [(6,), (3, 3), (4, 1, 1), (1, 2, 2, 1)]


@pytest.mark.parametrize("their_stages", STAGES, ids=str)
@pytest.mark.parametrize("our_stages", STAGES, ids=str)
def test_every_number_of_pipeline_stages_onto_every_other(
    their_stages: tuple[int, ...], our_stages: tuple[int, ...]
) -> None:
    shapes = itertools.product((1, 2, 8), (1, 4), (1, 4), ((WHOLE_POOL, MIXED), (TOKEN_MAJOR, HEAD_MAJOR)))
    for number, (heads, theirs, ours, (their_axes, our_axes)) in enumerate(shapes):
        their_block, our_block = BLOCK_SIZES[number % len(BLOCK_SIZES)]
        check_pair(
            [
                rank_layout(their_axes, their_block, heads, theirs, rank, their_stages)
                for rank in range(theirs * len(their_stages))
            ],
            [rank_layout(our_axes, our_block, heads, ours, rank, our_stages) for rank in range(ours * len(our_stages))],
            seed=number,
        )


def test_replicas_share_the_readers_and_the_requests() -> None:
    latent = rank_layout(TOKEN_MAJOR, 4, 1, 4, 2)
    chosen = [select_sources(latent, 8, (), turn).sources for turn in range(8)]
    assert sorted(source.rank for (source,) in chosen) == list(range(8))
    ranks = [select_sources(rank_layout(TOKEN_MAJOR, 4, 1, 4, rank), 8, (), 5) for rank in range(4)]
    assert sorted(selection.sources[0].rank for selection in ranks) == [0, 5, 6, 7]
    assert sorted(itertools.chain(*(selection.unread for selection in ranks))) == [1, 2, 3, 4]
    equal = [select_sources(rank_layout(TOKEN_MAJOR, 4, 2, 8, rank), 8, (), 3).sources[0] for rank in range(8)]
    assert equal == [Source(rank, 0, 1) for rank in range(8)]


def test_many_readers_of_one_rank() -> None:
    ranks = [select_sources(rank_layout(TOKEN_MAJOR, 4, 4, 4, rank), 2, (), 9) for rank in range(4)]
    assert ranks == [Selection((Source(rank // 2, rank % 2, 2),)) for rank in range(4)]
    assert select_sources(rank_layout(TOKEN_MAJOR, 4, 4, 1, 0), 1, (), 9) == Selection((Source(0, 0, 1),))


@pytest.mark.parametrize(
    ("num_producers", "stages", "said"), [(3, (), "3 ranks"), (3, (1, 1), "3 ranks"), (2, (1, 2), "3 layers")]
)
def test_ranks_that_make_no_model_are_refused(num_producers: int, stages: tuple[int, ...], said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        select_sources(rank_layout(TOKEN_MAJOR, 4, 4, 2, 1, (2,)), num_producers, stages, 0)
    assert refused.value.reason == "incompatible"


def pieces(producer: KvLayout, consumer: KvLayout) -> list[tuple[int, int, int]]:
    reshard = reshard_between(producer, consumer)
    assert reshard is not None
    return list(reshard.plan([1, 2, 3], [0, 1, 2], 0))


def test_pieces_are_as_long_as_both_orders_allow() -> None:
    """TP 2 to 1: a whole rank's block of head-major planes is one piece; token-major has one a token."""
    (half, whole) = (rank_layout(HEAD_MAJOR, 4, 4, 2, 1), rank_layout(HEAD_MAJOR, 4, 4, 1, 0))
    assert [length for _, _, length in pieces(half, whole)] == [half.block_bytes] * 3
    (half, whole) = (rank_layout(TOKEN_MAJOR, 4, 4, 2, 1), rank_layout(TOKEN_MAJOR, 4, 4, 1, 0))
    assert [length for _, _, length in pieces(half, whole)] == [2 * CELLS] * (3 * 2 * 4)


def test_neighbouring_blocks_of_other_sizes_are_one_span() -> None:
    small, large = (rank_layout(("token", "head", "kv"), size, 2, 1, 0) for size in (2, 4))
    small, large = (
        msgspec.structs.replace(layout, planes=(Plane(0, layout.block_bytes, layout.block_bytes),))
        for layout in (small, large)
    )
    reshard = reshard_between(small, large)
    assert reshard is not None
    each = small.block_bytes
    assert reshard.plan([1, 2, 3, 0], [0, 1], 0) == [(each, 0, 3 * each), (0, 3 * each, each)]
    assert reshard.plan([1, 2, 3], [2], 1) == [(3 * each, 4 * each, each)]  # the lease ends within the last block
    assert reshard.plan([], [], 0) == []


@pytest.mark.parametrize(
    ("lease", "local", "first", "said"),
    [
        ([0, 1], [0, 1], 0, "the lease has 4 tokens"),
        ([0, 1], [0], 1, "the lease has 4 tokens"),
        ([9], [0], 0, "the producer's"),
        ([0], [9], 0, "the consumer's"),
        ([0, 1, 2], [0, 0], 0, "twice"),
    ],
)
def test_what_does_not_fit_is_refused(lease: list[int], local: list[int], first: int, said: str) -> None:
    small, large = (rank_layout(TOKEN_MAJOR, size, 2, 1, 0) for size in (2, 4))
    reshard = reshard_between(small, large)
    assert reshard is not None
    with pytest.raises(Refusal, match=said) as refused:
        reshard.plan(lease, local, first)
    assert refused.value.reason == "invalid"

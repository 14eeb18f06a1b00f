from __future__ import annotations

import ctypes
import random
import threading
from array import array

import numpy as np
import pytest

from sidecar import copy_executor
from sidecar.copy_executor import CopyExecutor, Moves
from sidecar.reshard import Reshard
from sidecar.small_pieces import MIN_PIECES, copy_small
from sidecar.spans import check_spans
from tests.unit.sidecar.cut_layouts import HEAD_MAJOR, TOKEN_MAJOR, WHOLE_POOL, content, rank_layout


def pieces(lengths: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Where pieces of these lengths lie in a destination, with gaps and in any order, and where they come from."""
    order = rng.sample(range(len(lengths)), len(lengths))
    to, at = [0] * len(lengths), 7
    for index in order:
        to[index] = at
        at += lengths[index] + rng.choice([0, 0, 3])
    return to, [rng.randrange(20_000) for _ in lengths]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [[1], [64], [100], [33, 64], [8, 24, 256]])
def test_every_piece_arrives_and_nothing_else_is_touched(sizes: list[int], packed: bool) -> None:
    rng = random.Random(len(sizes))
    lengths = [size for size in sizes for _ in range(MIN_PIECES)]
    to, starts = pieces(lengths, rng)
    source = ctypes.create_string_buffer(rng.randbytes(21_000), 21_000)
    target = ctypes.create_string_buffer(max(to) + max(sizes) + 10)
    expected = bytearray(target.raw)
    for at, start, length in zip(to, starts, lengths, strict=True):
        expected[at : at + length] = source.raw[start : start + length]
    columns = [array("q", column) if packed else column for column in (to, starts, lengths)]
    got = copy_small(ctypes.addressof(target), columns[0], ctypes.addressof(source), *columns[1:])
    assert got == len(sizes) and target.raw == bytes(expected)


def test_few_pieces_of_a_length_are_left_to_memmove() -> None:
    assert copy_small(0, [0] * (MIN_PIECES - 1), 0, [0] * (MIN_PIECES - 1), [8] * (MIN_PIECES - 1)) == 0
    assert copy_small(0, [0] * MIN_PIECES, 0, [0] * MIN_PIECES, list(range(1, MIN_PIECES + 1))) == 0


@pytest.mark.parametrize("axes", [TOKEN_MAJOR, WHOLE_POOL, HEAD_MAJOR], ids=lambda axes: "-".join(axes))
@pytest.mark.parametrize(("their_tp", "our_tp"), [(1, 2), (2, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("by_library", [True, False])
def test_slices_of_heads_by_brute_force(
    axes: tuple[str, ...], their_tp: int, our_tp: int, by_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned and copied as a sidecar does, from every rank into one, beside a gather that knows no spans."""
    if not by_library:
        monkeypatch.setattr(copy_executor, "_copy_moves", None)
    rng = random.Random(our_tp)
    blocks = rng.sample(range(40), 24), rng.sample(range(40), 24)
    ours = rank_layout(axes, 16, 4, our_tp, our_tp - 1, (2,), 40, 16)
    got = np.zeros(ours.pool_bytes, np.uint8)
    executor = CopyExecutor(2)
    for rank in range(their_tp):
        theirs = rank_layout(axes, 16, 4, their_tp, rank, (2,), 40, 16)
        if not set(theirs.heads) & set(ours.heads):
            continue
        pool = np.zeros(theirs.pool_bytes, np.uint8)
        where, means = content(theirs, blocks[0])
        pool[where.ravel()] = numbers(means)
        spans = Reshard(theirs, ours).plan(*blocks, 0)
        check_spans(spans, theirs.pool_bytes, ours.pool_bytes)
        assert spans.num_bytes == sum(list(spans.lengths))
        ended = threading.Event()
        moves = Moves(got.ctypes.data, spans.local, pool.ctypes.data, spans.remote, spans.lengths)
        executor.submit(moves, lambda completed, ended=ended: ended.set())  # type: ignore[misc]
        assert ended.wait(20)
    executor.close()
    where, means = content(ours, blocks[1])
    expected = np.zeros(ours.pool_bytes, np.uint8)
    expected[where.ravel()] = numbers(means)
    assert np.array_equal(got, expected)


def numbers(what: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes that tell one place of the model from another."""
    return (what.ravel() * 2654435761 >> 13).astype(np.uint8)

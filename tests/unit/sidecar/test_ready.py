from __future__ import annotations

import itertools
import random

import pytest

from sidecar.errors import Refusal
from sidecar.layout import KvLayout, Plane
from sidecar.ready import (
    PartPlans,
    Ready,
    as_copied,
    follows,
    has_layers,
    likely_next,
    mark_fault,
    normal,
    of_layers,
    parts_between,
    plan_parts,
)

BLOCKS, LAYERS = 5, 3


def cells(mark: Ready) -> set[tuple[int, int]]:
    """(block, layer) of all that a mark says is computed."""
    whole = {(block, layer) for block in range(mark.first_block) for layer in range(LAYERS)}
    return whole | {(b, layer) for b in range(mark.first_block, mark.end_block) for layer in range(mark.num_layers)}


MARKS = [
    Ready(first, end, layers)
    for first in range(BLOCKS + 1)
    for end in range(first, BLOCKS + 1)
    for layers in range(LAYERS + 1)
]


def test_every_pair_of_marks_by_brute_force() -> None:
    """What follows adds to what was there, and the parts between are exactly the difference, each cell once."""
    assert not any(mark_fault(mark, BLOCKS, LAYERS) for mark in MARKS)
    num_followed = 0
    for old in {normal(mark, LAYERS) for mark in MARKS}:
        for new in {normal(mark, LAYERS) for mark in MARKS}:
            if not follows(old, new):
                continue
            num_followed += 1
            assert cells(old) <= cells(new)
            for wanted in range(BLOCKS + 1):
                parts = parts_between(old, new, LAYERS, wanted)
                got = [
                    (b, layer)
                    for first, end, low, high in parts
                    for b in range(first, end)
                    for layer in range(low, high)
                ]
                assert len(got) == len(set(got))
                assert set(got) == {cell for cell in cells(new) - cells(old) if cell[0] >= wanted}
    assert num_followed > 200


def test_the_likely_next_mark_goes_on_in_the_strip_and_is_right_at_an_even_pace() -> None:
    forms = {normal(mark, LAYERS) for mark in MARKS}
    for before in forms:
        for now in forms:
            if not follows(before, now):
                continue
            likely = likely_next(before, now, LAYERS)
            if likely is not None:
                assert follows(now, likely) and cells(likely) > cells(now)
                assert likely == normal(likely, LAYERS) and likely.first_block in (now.first_block, now.end_block)
    for pace in (1, 2, 5):
        marks = [normal(Ready(2, 4, layers), 10) for layers in range(0, 11, pace)]
        assert [likely_next(*pair, 10) for pair in itertools.pairwise(marks)] == [*marks[2:], None]


def test_normal_keeps_the_meaning_and_is_one_form() -> None:
    for mark in MARKS:
        assert cells(normal(mark, LAYERS)) == cells(mark)
        assert normal(normal(mark, LAYERS), LAYERS) == normal(mark, LAYERS)
    forms: dict[frozenset[tuple[int, int]], Ready] = {}
    for mark in MARKS:
        form = normal(mark, LAYERS)
        assert forms.setdefault(frozenset(cells(mark)), form) == form


@pytest.mark.parametrize("mark", [Ready(2, 1, 0), Ready(0, 6, 1), Ready(0, 1, 4), Ready(6, 6, 0)])
def test_a_mark_out_of_bounds(mark: Ready) -> None:
    assert mark_fault(mark, BLOCKS, LAYERS)


def layout(planes: tuple[Plane, ...], order: str = "block,layer,kv,token,head", num_layers: int = LAYERS) -> KvLayout:
    return KvLayout(8, 16, planes, num_layers, 2, 16, "float32", "m", order)


ONE_PLANE = layout((Plane(0, 300, 300),))
TWO_A_LAYER = layout(tuple(Plane(1000 * i, 50, 50) for i in range(2 * LAYERS)), "x")


def test_layers_of_a_layout() -> None:
    assert has_layers(ONE_PLANE) and has_layers(TWO_A_LAYER)
    assert not has_layers(layout((Plane(0, 300, 300),), "opaque"))
    assert not has_layers(layout((Plane(0, 301, 301),)))
    assert not has_layers(layout((Plane(0, 9, 9), Plane(100, 9, 9)), "x"))
    assert of_layers(ONE_PLANE, 0, LAYERS) is ONE_PLANE
    assert of_layers(ONE_PLANE, 1, 3).planes == (Plane(100, 300, 200),)
    assert of_layers(TWO_A_LAYER, 1, 2).planes == (Plane(2000, 50, 50), Plane(3000, 50, 50))


def test_without_layers_a_strip_counts_once_it_is_whole() -> None:
    opaque = layout((Plane(0, 300, 300),), "opaque")
    assert as_copied(Ready(1, 4, 2), opaque) == Ready(1, 1, 0)
    assert as_copied(Ready(1, 4, 3), opaque) == Ready(4, 4, 0)
    assert as_copied(Ready(1, 4, 2), ONE_PLANE) == Ready(1, 4, 2)


@pytest.mark.parametrize("shape", [ONE_PLANE, TWO_A_LAYER], ids=["one plane", "two a layer"])
def test_plans_made_ahead_are_those_made_at_the_mark(shape: KvLayout) -> None:
    rng = random.Random(2)
    num_right = 0
    for _ in range(200):
        remote, local = rng.sample(range(8), BLOCKS), rng.sample(range(8), BLOCKS)
        first = rng.randint(0, BLOCKS - 1)
        plans, before = PartPlans(shape, shape, local[first:], first), Ready()
        while plans.copied.first_block < BLOCKS:
            mark = plans.copied
            new = rng.choice([m for m in (normal(m, LAYERS) for m in MARKS) if follows(mark, m)])
            likely = likely_next(before, mark, LAYERS)
            if likely is not None and rng.random() < 0.5:
                new, num_right = likely, num_right + 1
            if rng.random() < 0.7:
                plans.look_ahead(remote)
            expected = plan_parts(parts_between(mark, new, LAYERS, first), shape, remote, shape, local[first:], first)
            assert plans.take(plans.checked(new, BLOCKS), remote) == list(expected)
            assert plans.copied == new
            before = mark
    assert num_right > 20


def test_a_mark_that_goes_back_is_refused() -> None:
    plans = PartPlans(ONE_PLANE, ONE_PLANE, [0, 1], 0)
    plans.take(plans.checked(Ready(1, 2, 1), 2), [3, 4])
    for wrong in (Ready(0, 2, 1), Ready(1, 1, 0), Ready(1, 3, 1)):
        with pytest.raises(Refusal, match=r"are said to be computed|after"):
            plans.checked(wrong, 2)


@pytest.mark.parametrize("shape", [ONE_PLANE, TWO_A_LAYER], ids=["one plane", "two a layer"])
def test_the_parts_of_a_random_walk_copy_every_byte_once(shape: KvLayout) -> None:
    rng = random.Random(1)
    for _ in range(50):
        remote, local = rng.sample(range(8), BLOCKS), rng.sample(range(8), BLOCKS)
        first = rng.randint(0, BLOCKS - 1)
        mark, written, moves = Ready(), [0] * shape.pool_bytes, {}
        while mark.first_block < BLOCKS:
            new = rng.choice([m for m in (normal(m, LAYERS) for m in MARKS) if follows(mark, m)])
            parts = parts_between(mark, new, LAYERS, first)
            for theirs, ours, length in plan_parts(parts, shape, remote, shape, local[first:], first):
                for offset in range(length):
                    written[ours + offset] += 1
                    moves[ours + offset] = theirs + offset
            mark = new
        expected = {
            plane.offset + local[i] * plane.stride_bytes + o: plane.offset + remote[i] * plane.stride_bytes + o
            for plane in shape.planes
            for i in range(first, BLOCKS)
            for o in range(plane.block_bytes)
        }
        assert moves == expected
        assert max(written) == 1


def test_parts_outside_the_transfer_are_refused() -> None:
    with pytest.raises(Refusal, match="not all of this transfer"):
        plan_parts([(0, 3, 0, 1)], ONE_PLANE, [1, 2], ONE_PLANE, [1, 2], 0)

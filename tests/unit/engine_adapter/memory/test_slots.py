from __future__ import annotations

import random

import pytest

from engine_adapter.memory.slots import Slots, runs


def test_all_or_nothing() -> None:
    slots = Slots(4)
    assert slots.take(5) is None
    first = slots.take(3)
    assert first == [0, 1, 2]
    assert slots.take(2) is None
    assert slots.take(1) == [3]
    slots.give_back(first)
    assert slots.num_free == 3


def test_a_slot_is_given_back_once() -> None:
    slots = Slots(2)
    taken = slots.take(2)
    assert taken is not None
    slots.give_back(taken)
    with pytest.raises(AssertionError):
        slots.give_back([0])


def test_a_part_of_a_buffer_can_have_slots_of_its_own() -> None:
    assert Slots(2, first=6).take(2) == [6, 7]


def test_neighbours_on_both_sides_are_one_run() -> None:
    assert runs([5, 6, 7, 9, 10], [0, 1, 2, 3, 5]) == [(5, 0, 3), (9, 3, 1), (10, 5, 1)]
    assert runs([], []) == []
    rng = random.Random(3)
    blocks, slots = rng.sample(range(40), 25), rng.sample(range(40), 25)
    pairs = [(block + k, slot + k) for block, slot, count in runs(blocks, slots) for k in range(count)]
    assert pairs == list(zip(blocks, slots, strict=True))

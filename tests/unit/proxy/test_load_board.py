from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, monotonic_ns

import pytest

from proxy import load_board
from proxy.load_board import BEAT, HEAD_SINCE, NUM_SLOTS, SERVING, WAITING, LoadBoard, SharedLoad
from proxy.load_ledger import Hold, InstanceLoad
from proxy.membership import MAX_INSTANCES
from proxy.scheduling import make_policy
from tests.unit.proxy.scheduling.fleet import Stub, StubAsk


@dataclass
class Has:
    load: InstanceLoad


@pytest.fixture
def board() -> Iterator[LoadBoard]:
    made = LoadBoard(3)
    yield made
    made.close()


def others(load: InstanceLoad) -> tuple[int, int, int, int]:
    return (load.others_tokens, load.others_requests, load.others_kv_tokens, load.others_policy_load)


def test_what_a_worker_reserves_the_others_see_and_its_own_is_not_counted_twice(board: LoadBoard) -> None:
    rows = [board.row(one) for one in range(3)]
    loads = [row.load_of("decode", "h:1") for row in rows]
    held = [loads[0].reserve(100, 60), loads[1].reserve(10, 5), loads[1].reserve(1)]
    hold = Hold(loads[1], 7)
    for row, load in zip(rows, loads, strict=True):
        row.look([Has(load)])
    assert [others(load) for load in loads] == [(11, 2, 5, 7), (100, 1, 60, 0), (111, 3, 65, 7)]
    assert (loads[0].num_tokens, loads[0].num_requests, loads[0].all_requests) == (100, 1, 3)
    assert rows[2].load_of("decode", "h:1").reserve(3).ahead == 0, "what it has not looked at it does not know"
    assert loads[2].reserve(3).ahead == 111
    for one in (*held, *held, hold, hold):
        one.release()
    rows[2].look([Has(loads[2])])
    assert others(loads[2]) == (0, 0, 0, 0)


def test_instances_of_one_address_and_two_roles_are_two(board: LoadBoard) -> None:
    row, other = board.row(0), board.row(1)
    decode, prefill = row.load_of("decode", "h:1"), other.load_of("prefill", "h:1")
    decode.reserve(5)
    other.look([Has(prefill)])
    assert others(prefill) == (0, 0, 0, 0)


def test_workers_find_the_same_slot_in_whatever_order_instances_come_and_go(board: LoadBoard) -> None:
    """A hundred thousand events would not fill the board: slots are used again."""
    chance = random.Random(1)
    rows = [board.row(one) for one in range(3)]
    open_loads: list[dict[str, InstanceLoad]] = [{} for _ in rows]
    for _ in range(3000):
        worker, key = chance.randrange(3), f"h:{chance.randrange(40)}"
        mine = open_loads[worker]
        if key in mine:
            mine.pop(key).leave()
        else:
            mine[key] = rows[worker].load_of("decode", key)
            mine[key].reserve(int(key[2:]) + 1)
    for worker, mine in enumerate(open_loads):
        for key, load in mine.items():
            rows[worker].look([Has(load)])
            there = sum(key in theirs for theirs in open_loads) - 1
            assert others(load)[:2] == ((int(key[2:]) + 1) * there, there)


def test_a_slot_is_free_again_when_all_have_left_and_its_tag_is_another(
    board: LoadBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_board, "NUM_SLOTS", 4)
    row, other = board.row(0), board.row(1)
    for number in range(20):
        mine, theirs = row.load_of("decode", f"h:{number}"), other.load_of("decode", f"h:{number}")
        assert mine.is_used_elsewhere()
        late = mine.reserve(9)
        mine.leave()
        mine.leave()
        assert not theirs.is_used_elsewhere()
        theirs.leave()
        late.release()
    full = [row.load_of("decode", f"f:{number}") for number in range(4)]
    with pytest.raises(MemoryError, match="slots"):
        row.load_of("decode", "one too many")
    full[2].leave()
    row.load_of("decode", "one too many")


def test_work_that_outlives_its_instance_is_not_written_to_the_next_ones_slot(board: LoadBoard) -> None:
    row, other = board.row(0), board.row(1)
    left = row.load_of("decode", "h:1")
    late = left.reserve(50)
    left.leave()
    again, seen = row.load_of("decode", "h:1"), other.load_of("decode", "h:1")
    again.reserve(3)
    late.release()
    left.reserve(1000)
    other.look([Has(seen)])
    assert seen.others_tokens == 3 and left.num_tokens == 1000


def test_two_loads_of_one_instance_in_one_worker_share_the_slot(board: LoadBoard) -> None:
    """One that waits to join while the old one leaves."""
    row, other = board.row(0), board.row(1)
    old, new, seen = row.load_of("decode", "h:1"), row.load_of("decode", "h:1"), other.load_of("decode", "h:1")
    old.leave()
    assert seen.is_used_elsewhere()
    new.leave()
    assert not seen.is_used_elsewhere()


def test_a_dead_workers_row_is_wiped_and_its_load_gone(board: LoadBoard) -> None:
    row, other = board.row(0), board.row(1)
    row.note(SERVING, 1)
    row.note(WAITING, 4)
    lost, seen = row.load_of("decode", "h:1"), other.load_of("decode", "h:1")
    lost.reserve(500, 500)
    kept = other.load_of("prefill", "p:1")
    kept.reserve(7)
    board.wipe(0)
    other.look([Has(seen)])
    assert others(seen) == (0, 0, 0, 0) and not seen.is_used_elsewhere()
    assert (other.num_waiting_elsewhere(), board.missing()) == (0, [0, 1, 2])
    third = board.row(2)
    also = third.load_of("prefill", "p:1")
    third.look([Has(also)])
    assert also.others_tokens == 7


def test_room_counts_what_the_others_reserved(board: LoadBoard) -> None:
    row, other = board.row(0), board.row(1)
    mine, theirs = row.load_of("decode", "h:1"), other.load_of("decode", "h:1")
    mine.max_kv_tokens, mine.max_streams = 100, 2
    assert mine.has_room(1000), "an idle instance takes any"
    held = theirs.reserve(1, 90)
    row.look([Has(mine)])
    assert mine.has_room(10) and not mine.has_room(11)
    more = theirs.reserve(1, 0)
    row.look([Has(mine)])
    assert not mine.has_room(1), "two streams are open"
    more.release()
    held.release()
    row.look([Has(mine)])
    assert mine.has_room(1000)


@pytest.mark.parametrize("name", ["least_load", "round_robin"])
def test_idle_instances_take_turns_over_all_workers(board: LoadBoard, name: str) -> None:
    """As evenly as with one: whoever was picked least recently by anybody is next."""
    rows = [board.row(one) for one in range(3)]
    fleets = [[Stub(f"h:{i}", load=row.load_of("decode", f"h:{i}")) for i in range(5)] for row in rows]
    policies = [make_policy(name, "decode") for _ in rows]
    counts = [0] * 5
    chance = random.Random(3)
    for _ in range(500):
        worker = chance.randrange(3)
        rows[worker].look(fleets[worker])
        picked = policies[worker].pick(fleets[worker], 100, StubAsk())
        assert isinstance(picked.load, SharedLoad)
        picked.load.picked()
        picked.load.reserve(100).release()
        counts[fleets[worker].index(picked)] += 1
    assert counts == [100] * 5


def test_speed_is_measured_from_the_end_of_whoevers_work_was_before(board: LoadBoard) -> None:
    mine, theirs = (board.row(one).load_of("prefill", "h:1") for one in (0, 1))
    now = monotonic()
    theirs.observe_queue(1000, now - 5, now - 1)
    mine.observe_queue(1000, now - 5, now)
    assert mine.speed == pytest.approx(1000, rel=0.01)


def test_whose_first_request_waits_longest_goes_first_unless_its_worker_is_stuck(board: LoadBoard) -> None:
    row, other = board.row(0), board.row(1)
    other.note(SERVING, 1)
    other.beat()
    other.note(HEAD_SINCE, 50)
    assert row.is_first(40) and not row.is_first(60)
    other.note(BEAT, monotonic_ns() - 2 * load_board.STALE_NS)
    assert row.is_first(60)
    other.beat()
    other.note(HEAD_SINCE, 0)
    assert row.is_first(60)


def _count(board: LoadBoard, worker: int, num: int) -> None:
    load = board.row(worker).load_of("decode", "h:1")
    for _ in range(num):
        load.reserve(1 << 40).release()
    load.reserve(worker)
    os._exit(0)


def test_a_reader_never_sees_a_torn_value_while_another_process_writes() -> None:
    board = LoadBoard(2)
    row = board.row(0)
    load = row.load_of("decode", "h:1")
    process = multiprocessing.get_context("fork").Process(target=_count, args=(board, 1, 100_000))
    process.start()
    seen = set()
    while process.is_alive():
        for _ in range(1000):
            row.look([Has(load)])
            seen.add(load.others_tokens)
    row.look([Has(load)])
    assert seen <= {0, 1, 1 << 40} and load.others_tokens == 1
    board.close()


def test_there_are_slots_for_all_instances_of_all_workers() -> None:
    assert NUM_SLOTS >= 2 * MAX_INSTANCES

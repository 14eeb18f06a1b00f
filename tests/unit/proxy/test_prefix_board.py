from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from proxy.load_board import LoadBoard
from proxy.prefix_board import CELL_BITS, PrefixBoard, SharedPrefixes
from proxy.scheduling import Prefix
from proxy.scheduling.prefix_affinity import PrefixAffinity
from tests.unit.proxy.scheduling.fleet import Stub, StubAsk

_CHANCE = random.Random(1)
_MADE = [_CHANCE.getrandbits(64) - (1 << 63) for _ in range(200)]
KEYS = tuple({key & ((1 << CELL_BITS) - 1): key for key in _MADE}.values())[
    :160
]  # as `hash` makes them, no two in one cell


@pytest.fixture
def boards() -> Iterator[tuple[LoadBoard, PrefixBoard]]:
    loads, prefixes = LoadBoard(2), PrefixBoard()
    yield loads, prefixes
    loads.close()
    prefixes.close()


def test_what_one_worker_sent_the_other_knows_by_its_own_name(boards: tuple[LoadBoard, PrefixBoard]) -> None:
    row, other = boards[0].row(0), boards[0].row(1)
    row.load_of("prefill", "127.0.0.1:1", "localhost:1")
    seen = other.load_of("prefill", "127.0.0.1:1", "0.0.0.0:1")
    mine, theirs = SharedPrefixes(boards[1], row), SharedPrefixes(boards[1], other)
    mine.remember("prefill", KEYS, "localhost:1")
    assert {mine.get(key) for key in KEYS} == {"localhost:1"}
    assert {theirs.get(key) for key in KEYS} == {"0.0.0.0:1"}
    assert theirs.get(KEYS[0] ^ (1 << CELL_BITS)) is None, "the same cell, another prefix"
    mine.remember("prefill", [KEYS[0] ^ (1 << CELL_BITS)], "localhost:1")
    assert theirs.get(KEYS[0]) is None
    mine.remember("decode", KEYS[1:2], "nobody:1")
    assert theirs.get(KEYS[1]) == "0.0.0.0:1"
    seen.leave()
    assert theirs.get(KEYS[1]) is None and mine.get(KEYS[1]) == "localhost:1"


def test_a_prefix_goes_where_another_worker_sent_it(boards: tuple[LoadBoard, PrefixBoard]) -> None:
    rows = [boards[0].row(0), boards[0].row(1)]
    fleets = [[Stub(f"h:{i}", load=row.load_of("prefill", f"h:{i}")) for i in range(4)] for row in rows]
    policies = [PrefixAffinity("prefill"), PrefixAffinity("prefill")]
    for row, policy in zip(rows, policies, strict=True):
        policy.share(SharedPrefixes(boards[1], row))
    for number in range(40):
        ask = StubAsk(prefix=Prefix(KEYS[number * 4 : number * 4 + 4], 256.0))
        rows[0].look(fleets[0])
        first = policies[0].pick(fleets[0], 1100, ask)
        first.load.picked()  # type: ignore[attr-defined]
        rows[1].look(fleets[1])
        assert policies[1].pick(fleets[1], 1100, ask).key == first.key

"""A pull that copies by the producer's board before it has asked: what it may report, and when it has to claim."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from sidecar.errors import Refusal
from sidecar.lease_board import BoardView, LeaseBoard, mark_of
from sidecar.protocol import Claimed, Done, Pull, PullEnded, PullSource, pack_block_ids
from sidecar.regions import reopen_read_only
from sidecar.transport.contract import COPIED, VOID
from tests.unit.sidecar.test_transfer_table import SOURCE, Stage

KNOWN = msgspec.structs.replace(SOURCE, packed_block_ids=pack_block_ids([0, 1]))
MARK = mark_of(KNOWN.transfer_id, KNOWN.token, KNOWN.packed_block_ids)


class Known(Stage):
    """A stage whose producer has been reached, and whose board can be seen."""

    def __init__(self, **settings: float) -> None:
        super().__init__(**settings)
        self.board = LeaseBoard()
        self.view = BoardView(reopen_read_only(self.board.fd))
        self.board.post(MARK, 60.0)
        producer: Any = self.producer
        producer.board = self.view
        producer.live = lambda source: producer if not producer.control.closed else None

    def _report(self, ended: PullEnded) -> None:
        self.said_when_reported = list(self.producer.said)
        super()._report(ended)

    def pull(self, source: PullSource = KNOWN, local: list[int] | None = None, first_block: int = 0) -> None:
        self.table.begin(Pull("pull", (source,), [4, 5] if local is None else local, first_block, 30.0))

    @property
    def copying(self) -> bool:
        return self.producer.copy is not None

    def close(self) -> None:
        self.view.close()
        self.board.close()


@pytest.fixture
async def stage() -> Any:
    stage = Known()
    yield stage
    stage.close()


async def test_it_copies_at_once_and_reports_before_it_releases(stage: Known) -> None:
    stage.pull()
    assert stage.copying and stage.producer.num_claims == 0 and stage.producer.readers
    [reader] = stage.producer.readers
    assert not reader.claimed  # type: ignore[attr-defined]  # no heartbeat for it
    stage.producer.gates["copy"].set_result(COPIED)
    ended = await stage.end()
    assert stage.said_when_reported == []
    assert (ended.ok, ended.num_blocks, ended.num_bytes, ended.transport) == (True, 2, 20, "shm")
    assert stage.producer.said == ["read"] and stage.producer.num_claims == 0 and not stage.producer.readers


@pytest.mark.parametrize("reason", ["expired", "released", "wrong_engine", "stale_epoch"])
async def test_what_the_board_no_longer_shows_is_claimed_and_its_refusal_reported(stage: Known, reason: str) -> None:
    stage.pull()
    stage.board.take_off(MARK)
    stage.producer.gates["copy"].set_result(COPIED)
    await stage.producer.reached["claim"].wait()
    assert stage.reported == []
    stage.producer.gates["claim"].set_exception(Refusal(reason, "no"))
    ended = await stage.end()
    assert (ended.ok, ended.reason, ended.num_bytes) == (False, reason, 0)
    assert stage.producer.said == []


async def test_what_the_board_no_longer_shows_is_copied_again_under_the_claim(stage: Known) -> None:
    stage.pull()
    first = stage.producer.copy
    stage.board.close()
    stage.producer.gates["copy"].set_result(COPIED)
    await stage.producer.reached["claim"].wait()
    stage.producer.reached["copy"].clear()
    stage.producer.gates["claim"].set_result(Claimed(1, [0, 1], 32, 5.0))
    await stage.producer.reached["copy"].wait()
    assert stage.producer.copy is not first
    stage.producer.gates["copy"].set_result(COPIED)
    await stage.producer.reached["release"].wait()
    assert stage.reported == []
    stage.producer.gates["release"].set_result(Done(2))
    assert (await stage.end()).ok
    assert stage.producer.said == ["consumed"]


@pytest.fixture
async def remote() -> Any:
    """A stage whose producer looks at its board itself."""
    stage = Known()
    producer: Any = stage.producer
    producer.board, producer.memory.checks_marks = None, True
    yield stage
    stage.close()


async def test_over_tcp_the_mark_is_sent_along_and_nothing_else_asked(remote: Known) -> None:
    remote.pull()
    assert remote.copying and remote.producer.marks == [MARK] and remote.producer.num_claims == 0
    remote.producer.gates["copy"].set_result(COPIED)
    ended = await remote.end()
    assert remote.said_when_reported == [] and remote.producer.said == ["read"]
    assert (ended.ok, ended.num_blocks, ended.num_bytes) == (True, 2, 20) and not remote.producer.readers


async def test_what_the_producer_found_no_longer_leased_is_copied_again_under_the_claim(remote: Known) -> None:
    remote.pull()
    remote.producer.gates["copy"].set_result(VOID)
    await remote.producer.reached["claim"].wait()
    remote.producer.reached["copy"].clear()
    remote.producer.gates["claim"].set_result(Claimed(1, [0, 1], 32, 5.0))
    await remote.producer.reached["copy"].wait()
    assert remote.producer.marks == [MARK, 0] and remote.reported == []
    remote.producer.gates["copy"].set_result(COPIED)
    await remote.producer.reached["release"].wait()
    remote.producer.gates["release"].set_result(Done(2))
    assert (await remote.end()).ok and remote.producer.said == ["consumed"]


async def test_a_claimed_copy_that_ends_in_void_is_no_copy(remote: Known) -> None:
    remote.pull(SOURCE)
    await remote.producer.reached["claim"].wait()
    remote.producer.gates["claim"].set_result(Claimed(1, [0, 1], 32, 5.0))
    await remote.producer.reached["copy"].wait()
    remote.producer.gates["copy"].set_result(VOID)
    assert (await remote.end()).reason == "transport"


async def test_a_transport_that_checks_no_marks_reads_under_the_claim(remote: Known) -> None:
    producer: Any = remote.producer
    producer.memory.checks_marks = False
    remote.pull()
    await remote.producer.reached["claim"].wait()
    assert not remote.copying
    await remote.table.close("the end")


def unknown_sources() -> Iterator[Any]:
    yield pytest.param(SOURCE, id="no blocks named")
    for field, value in (
        ("packed_block_ids", pack_block_ids([1, 0])),
        ("packed_block_ids", pack_block_ids([0, 1, 2])),
        ("packed_block_ids", KNOWN.packed_block_ids[:-1]),
        ("packed_block_ids", b""),
        ("token", "guess"),
        ("transfer_id", "another"),
    ):
        yield pytest.param(msgspec.structs.replace(KNOWN, **{field: value}), id=f"{field}={value!r}")


@pytest.mark.parametrize("source", list(unknown_sources()))
async def test_what_the_board_does_not_show_is_not_copied_before_the_claim(stage: Known, source: PullSource) -> None:
    stage.pull(source)
    await stage.producer.reached["claim"].wait()
    assert not stage.copying
    stage.producer.gates["claim"].set_exception(Refusal("wrong_token", "no"))
    assert (await stage.end()).reason == "wrong_token"
    assert not stage.copying


@pytest.mark.parametrize(("local", "first_block"), [([4, 4], 0), ([4, 5], 1), ([8], 0), ([], 0)], ids=str)
async def test_what_makes_no_sense_is_left_to_the_claim(stage: Known, local: list[int], first_block: int) -> None:
    stage.pull(KNOWN, local, first_block)
    await stage.producer.reached["claim"].wait()
    assert not stage.copying
    stage.producer.gates["claim"].set_result(Claimed(1, [0, 1], 32, 5.0))
    if not local:
        await stage.producer.reached["release"].wait()
        stage.producer.gates["release"].set_result(Done(2))
    assert (await stage.end()).reason == ("" if not local else "invalid")


async def test_what_takes_long_is_claimed_first() -> None:
    stage = Known(copy_bytes_per_s=100)
    stage.pull()
    await stage.producer.reached["claim"].wait()
    assert not stage.copying
    stage.producer.gates["claim"].set_exception(Refusal("expired", "no"))
    await stage.end()
    stage.close()


@pytest.mark.parametrize("how", ["abandon", "supersede", "lost", "close"])
async def test_interrupted_it_is_reported_when_nothing_writes_any_more(stage: Known, how: str) -> None:
    stage.pull()
    if how == "abandon":
        stage.table.abandon("pull")
    elif how == "supersede":
        stage.table.supersede("pull")
    elif how == "lost":
        [reader] = stage.producer.readers
        reader.interrupt("unreachable", "gone")  # type: ignore[attr-defined]
    else:
        await stage.table.close("the end")
    ended = await stage.end()
    assert not ended.ok and ended.reason == ("unreachable" if how == "lost" else "abandoned")
    said = ["stop", "drop"] if how == "abandon" else ["stop"]
    assert stage.producer.said == said and stage.producer.num_claims == 0 and not stage.producer.readers


async def test_one_that_does_not_stop_is_cut(stage: Known) -> None:
    stage.producer.stubborn = True
    stage.pull()
    stage.table.supersede("pull")
    assert not (await stage.end()).ok
    assert stage.producer.said == ["stop", "cut"]


async def test_a_broken_copy_fails_the_pull_and_cuts_the_producer(stage: Known) -> None:
    stage.pull()
    stage.producer.gates["copy"].set_result("the disk is on fire")
    ended = await stage.end()
    assert (ended.ok, ended.reason, ended.message) == (False, "transport", "the disk is on fire")
    assert stage.producer.said == ["cut"]


async def test_a_second_rank_is_claimed(stage: Known) -> None:
    """Which ranks a claim is for, and who reads with whom, only the producer can tell."""
    pull = Pull("pull", (KNOWN, KNOWN), [4, 5], 0, 30.0)
    stage.table.begin(pull)
    await asyncio.sleep(0)
    assert not stage.copying
    await stage.table.close("the end")

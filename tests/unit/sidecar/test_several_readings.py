"""A pull from two ranks with scripted producers: whatever one of them does, one end, and no lease read by halves."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sidecar.config import SidecarConfig
from sidecar.errors import Refusal
from sidecar.layout import KvLayout, Plane
from sidecar.metrics import SidecarMetrics
from sidecar.protocol import Claimed, Done, Pull, PullEnded, PullSource
from sidecar.reshard import reshard_between
from sidecar.transfer_table import TransferTable
from sidecar.transport.contract import COPIED
from tests.unit.sidecar.test_transfer_table import STEPS, Producer

WHOLE = KvLayout(8, 16, (Plane(0, 10, 10),), 1, 2, 1, "float32", "m", "o", ("head",))
HALVES = [
    msgspec.structs.replace(
        WHOLE, planes=(Plane(0, 5, 5),), num_kv_heads=1, tp_rank=rank, tp_size=2, total_kv_heads=2
    )
    for rank in range(2)
]  # fmt: skip
SOURCES = tuple(PullSource("h", 1 + rank, "p", f"t{rank}", "s", "ep", 2) for rank in range(2))


class Stage:
    """A TransferTable before two ranks of one producer, each at a step of its own."""

    def __init__(self) -> None:
        self.reported: list[PullEnded] = []
        self.done = asyncio.Event()
        self.ranks = [Producer(), Producer()]
        for rank, layout in zip(self.ranks, HALVES, strict=True):
            rank.layout, rank.num_bytes = layout, layout.pool_bytes
            rank.reshard = reshard_between(layout, WHOLE)  # type: ignore[assignment]
        peers: Any = SimpleNamespace(
            live=lambda source: None,
            connect=lambda source: self._of(source).connect(source),
            drop=lambda source: self._of(source).drop(source),
            cut=lambda link, why: link.cut(link, why),
        )
        config = SidecarConfig(socket="s", engine_id="e", stop_grace_s=0.1)
        registration: Any = SimpleNamespace(layout=WHOLE, region=SimpleNamespace(num_bytes=WHOLE.pool_bytes))
        self.table = TransferTable(config, registration, peers, SidecarMetrics(), self._report)

    def _of(self, source: PullSource) -> Producer:
        return self.ranks[SOURCES.index(source)]

    def _report(self, ended: PullEnded) -> None:
        for rank in self.ranks:
            assert rank.copy is None or rank.copy.ended.done(), "reported while something may still write"
        self.reported.append(ended)
        self.done.set()

    def begin(self) -> None:
        self.table.begin(Pull("pull", SOURCES, [4, 5], 0, 30.0))

    async def go_to(self, *steps: str) -> None:
        """Let each rank do everything before its step; before a release both have copied."""
        results = {"claim": Claimed(1, [0, 1], 32, 5.0), "copy": COPIED}
        for before in STEPS:
            for rank, step in zip(self.ranks, steps, strict=True):
                if STEPS.index(before) <= STEPS.index(step):
                    await asyncio.wait_for(rank.reached[before].wait(), 5)
                if STEPS.index(before) < STEPS.index(step):
                    rank.gates[before].set_result(rank if before == "connect" else results[before])

    async def end(self) -> PullEnded:
        await asyncio.wait_for(self.done.wait(), 5)
        for _ in range(5):
            await asyncio.sleep(0)
        [ended] = self.reported
        assert len(self.table) == 0
        return ended


TOGETHER = [steps for steps in itertools.product(STEPS, repeat=2) if (steps[0] == "release") == (steps[1] == "release")]


async def test_one_end_when_both_have_confirmed() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("release", "release")
    stage.ranks[1].gates["release"].set_result(Done(1))
    await asyncio.sleep(0)
    assert not stage.reported
    stage.ranks[0].gates["release"].set_result(Done(1))
    ended = await stage.end()
    assert (ended.ok, ended.num_blocks, ended.num_bytes, ended.peer) == (True, 2, 20, "p@h:1")
    assert [rank.said for rank in stage.ranks] == [["consumed"]] * 2


async def test_nothing_is_consumed_before_all_have_copied() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("copy", "claim")
    stage.ranks[0].gates["copy"].set_result(COPIED)
    for _ in range(5):
        await asyncio.sleep(0)
    assert stage.ranks[0].said == []
    stage.ranks[1].gates["claim"].set_exception(Refusal("expired", "too late"))
    ended = await stage.end()
    assert (ended.ok, ended.reason, ended.peer) == (False, "expired", "p@h:2")
    assert stage.ranks[0].said == ["returned"]


@pytest.mark.parametrize("steps", TOGETHER, ids="-".join)
async def test_one_that_fails_ends_the_other(steps: tuple[str, str]) -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to(*steps)
    other, failing = stage.ranks
    if steps[1] == "copy":
        failing.gates["copy"].set_result("status -1")
    else:
        failing.gates[steps[1]].set_exception(Refusal("unknown", "no"))
    if steps[0] == "release":  # too late for the other, which is only waiting for its confirmation
        other.gates["release"].set_result(Done(1))
    ended = await stage.end()
    assert (ended.ok, ended.reason) == (False, "transport" if steps[1] == "copy" else "unknown")
    told = {"connect": [], "claim": ["returned"], "copy": ["stop", "returned"], "release": ["consumed"]}
    assert other.said == told[steps[0]]


@pytest.mark.parametrize("steps", TOGETHER, ids="-".join)
async def test_abandoned_both_leases_are_dropped(steps: tuple[str, str]) -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to(*steps)
    stage.table.abandon("pull")
    if steps[0] == "release":
        for rank in stage.ranks:
            rank.gates["release"].set_result(Done(1))
        assert (await stage.end()).ok
        return
    ended = await stage.end()
    assert (ended.ok, ended.reason) == (False, "abandoned")
    for rank, step in zip(stage.ranks, steps, strict=True):
        assert rank.said == (["stop", "drop"] if step == "copy" else ["drop"])


async def test_abandoned_when_one_has_copied_and_the_other_has_not() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("copy", "copy")
    stage.ranks[0].gates["copy"].set_result(COPIED)
    await asyncio.sleep(0)
    stage.table.abandon("pull")
    assert (await stage.end()).reason == "abandoned"
    assert [rank.said for rank in stage.ranks] == [["drop"], ["stop", "drop"]]


async def test_ranks_that_cannot_make_a_model_are_refused_before_anybody_is_asked() -> None:
    stage = Stage()
    stage.table.begin(Pull("pull", (*SOURCES, SOURCES[0]), [4, 5], 0, 30.0))
    ended = await stage.end()
    assert (ended.reason, ended.peer) == ("incompatible", "p@h:1") and "3 ranks" in ended.message
    assert not stage.ranks[0].reached["connect"].is_set()

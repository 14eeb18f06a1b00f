from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from sidecar.config import SidecarConfig
from sidecar.errors import OfferRefused, Refusal
from sidecar.landing import TRANSITIONS, Happening, State
from sidecar.landings import MAX_SOURCES, Landings, OpenLanding
from sidecar.metrics import SidecarMetrics
from sidecar.protocol import Land, Landing, Pull, PullEnded, PullSource


class Pulls:
    """Stands for the TransferTable: says what it was asked, ends pulls when told."""

    def __init__(self) -> None:
        self.begun: list[Pull] = []
        self.said: list[str] = []

    def begin(self, request: Pull) -> None:
        self.begun.append(request)

    def abandon(self, pull_id: str) -> None:
        self.said.append(f"abandon {pull_id}")

    def supersede(self, pull_id: str) -> None:
        self.said.append(f"supersede {pull_id}")

    def drop(self, source: PullSource) -> None:
        self.said.append(f"drop {source.transfer_id}")


class Stage:
    def __init__(self, **settings: int) -> None:
        self.reported: list[PullEnded] = []
        self.told = asyncio.Event()
        self.pulls = Pulls()
        config = SidecarConfig(socket="s", engine_id="e", **settings)  # type: ignore[arg-type]
        self.landings = Landings(config, "epoch", 10, SidecarMetrics(), self._report)
        self.landings.pulls = self.pulls  # type: ignore[assignment]

    def _report(self, ended: PullEnded) -> None:
        self.reported.append(ended)
        self.told.set()

    def land(self, pull_id: str = "a", blocks: tuple[int, ...] = (1, 2), deadline_s: float = 30.0) -> Landing:
        return self.landings.land(Land(7, pull_id, list(blocks), 1, deadline_s))

    def deliver(self, landing: Landing, name: str, num_blocks: int = 3) -> None:
        self.landings.deliver(landing.landing_id, landing.token, source(name, num_blocks))

    async def end(self, reason: str = "", pull_id: str = "a") -> None:
        self.landings.pull_ended(PullEnded(pull_id, not reason, reason, "m", 2, 20, 0.1, "shm", "p"))
        await asyncio.sleep(0)


def source(name: str, num_blocks: int = 3) -> PullSource:
    return PullSource("h", 1, "p", name, "t", "e", num_blocks)


def outcomes(stage: Stage) -> list[tuple[bool, str]]:
    return [(ended.ok, ended.reason) for ended in stage.reported]


async def test_a_landing_is_filled_and_reported_once() -> None:
    stage = Stage()
    landing = stage.land()
    stage.deliver(landing, "x")
    (pull,) = stage.pulls.begun
    assert (pull.pull_id, pull.sources[0], pull.local_block_ids, pull.first_block) == ("a", source("x"), [1, 2], 1)
    assert 29 < pull.deadline_s <= 30
    await stage.end()
    assert outcomes(stage) == [(True, "")] and len(stage.landings) == 0
    with pytest.raises(Refusal, match="has ended") as refused:
        stage.deliver(landing, "y")
    assert refused.value.reason == "released"


async def test_pulls_that_are_no_landings_are_the_engines() -> None:
    stage = Stage()
    await stage.end("expired", "other")
    assert outcomes(stage) == [(False, "expired")]


async def test_a_lost_producer_leaves_room_for_the_next() -> None:
    stage = Stage()
    landing = stage.land()
    stage.deliver(landing, "x")
    await stage.end("unreachable")
    assert not stage.reported
    stage.deliver(landing, "y")
    assert stage.pulls.begun[-1].sources[0] == source("y")
    await stage.end()
    assert outcomes(stage) == [(True, "")] and stage.pulls.said == []


async def test_the_latest_takes_over_and_the_first_is_still_there_if_it_fails() -> None:
    stage = Stage()
    landing = stage.land()
    stage.deliver(landing, "x")
    stage.deliver(landing, "y")
    stage.deliver(landing, "y")  # told twice
    assert stage.pulls.said == ["supersede a"] and len(stage.pulls.begun) == 1
    await stage.end("abandoned")
    assert stage.pulls.begun[-1].sources[0] == source("y")
    await stage.end("unreachable")
    assert stage.pulls.begun[-1].sources[0] == source("x")
    await stage.end()
    assert outcomes(stage) == [(True, "")] and stage.pulls.said == ["supersede a"]


async def test_who_was_not_needed_is_told() -> None:
    stage = Stage()
    landing = stage.land()
    stage.deliver(landing, "x")
    stage.deliver(landing, "y")
    await stage.end("abandoned")
    await stage.end()
    assert stage.pulls.said == ["supersede a", "drop x"]


async def test_abandoned_while_waiting_and_while_filled() -> None:
    stage = Stage()
    stage.land()
    assert stage.landings.abandon("a") and outcomes(stage) == [(False, "abandoned")]
    assert not stage.landings.abandon("a")
    landing = stage.land("b")
    stage.deliver(landing, "x")
    assert stage.landings.abandon("b") and stage.pulls.said == ["abandon b"]
    with pytest.raises(Refusal, match="given up"):
        stage.deliver(landing, "y")
    await stage.end("abandoned", "b")
    assert outcomes(stage)[1:] == [(False, "abandoned")] and len(stage.landings) == 0


async def test_the_deadline_ends_what_waits_and_says_who_was_lost() -> None:
    stage = Stage()
    landing = stage.land(deadline_s=0.05)
    stage.deliver(landing, "x")
    await stage.end("unreachable")
    await asyncio.wait_for(stage.told.wait(), 10)
    assert outcomes(stage) == [(False, "timeout")] and "unreachable" in stage.reported[0].message


async def test_closing_ends_all_and_lets_nobody_in() -> None:
    stage = Stage()
    waiting, filled = stage.land("w"), stage.land("f")
    stage.deliver(filled, "x")
    stage.landings.close("gone")
    assert [ended.pull_id for ended in stage.reported] == ["w"]
    with pytest.raises(Refusal):
        stage.deliver(waiting, "y")
    await stage.end("abandoned", "f")
    assert [ended.pull_id for ended in stage.reported] == ["w", "f"]
    with pytest.raises(OfferRefused):
        stage.land("late")


async def test_limits() -> None:
    stage = Stage(max_pulls=1)
    landing = stage.land()
    with pytest.raises(OfferRefused, match="which is the limit"):
        stage.land("b")
    with pytest.raises(Refusal, match="4 blocks come, the landing is for 3"):
        stage.deliver(landing, "x", 4)
    with pytest.raises(Refusal, match="no landing"):
        stage.landings.deliver("other", "t", source("x"))
    with pytest.raises(Refusal, match="token") as refused:
        stage.landings.deliver(landing.landing_id, "wrong ☃", source("x"))
    assert refused.value.reason == "wrong_token"
    for index in range(MAX_SOURCES):
        stage.deliver(landing, str(index))
    with pytest.raises(Refusal, match="which is the limit"):
        stage.deliver(landing, "one more")


def test_every_step_of_the_table_and_no_other() -> None:
    for state, happening in itertools.product(State, Happening):
        landing: Any = OpenLanding(Land(1, "a", [], 0, 1.0), "l", "t", 0.0)
        landing.state = state
        if (state, happening) in TRANSITIONS:
            landing.step(happening)
            assert landing.state is TRANSITIONS[state, happening]
        else:
            with pytest.raises(Refusal):
                landing.step(happening)
            assert landing.state is state

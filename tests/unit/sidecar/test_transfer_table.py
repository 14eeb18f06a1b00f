"""Every pull's story with a scripted producer: interrupted at each step, for each reason, reported exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sidecar.config import SidecarConfig
from sidecar.errors import FrameError, PeerLost, Refusal
from sidecar.layout import KvLayout, Plane
from sidecar.leases import Reader
from sidecar.metrics import SidecarMetrics
from sidecar.protocol import Claimed, Computed, Done, Pull, PullEnded, PullSource, Ready, Withdrawn
from sidecar.transfer_table import TransferTable
from sidecar.transport.contract import COPIED, STOPPED, PendingCopy

LAYOUT = KvLayout(8, 16, (Plane(0, 10, 10),), 1, 1, 1, "float32", "m", "o")
SOURCE = PullSource("h", 1, "p", "t", "s", "ep", 2)
STEPS = ("connect", "claim", "copy", "release")


class Copy(PendingCopy):
    def __init__(self, producer: Producer) -> None:
        super().__init__()
        self.producer = producer

    def stop(self) -> None:
        self.producer.said.append("stop")
        if not self.producer.stubborn:
            self._finish(STOPPED)


class Producer:
    """Stands for PeerTable, Link and PeerMemory: each step waits until the test lets it go on."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.reached = {step: asyncio.Event() for step in STEPS}
        self.gates: dict[str, asyncio.Future[Any]] = {}
        self.marks: list[int] = []
        self.num_claims = 0
        self.stubborn = False
        self.name, self.layout, self.num_bytes = "p@h:1", LAYOUT, LAYOUT.pool_bytes
        self.control = SimpleNamespace(closed=False)
        self.memory = SimpleNamespace(transport="shm", checks_marks=False, read=self.read)
        self.reshard = None
        self.readers: set[object] = set()
        self.copy: Copy | None = None
        self.follower: Any = None

    def gate(self, step: str) -> asyncio.Future[Any]:
        self.gates[step] = asyncio.get_running_loop().create_future()
        self.gates[step].add_done_callback(lambda done: done.cancelled() or done.exception())
        self.reached[step].set()
        return self.gates[step]

    def live(self, source: PullSource) -> Any:
        return None

    def connect(self, source: PullSource) -> Any:
        return self.gate("connect")

    def claim(self, source: PullSource, reader: Reader) -> Any:
        self.num_claims += 1
        return self.gate("claim")

    def follow(self, source: PullSource, follower: Any) -> None:
        self.follower = follower

    def read(self, spans: object, mark: int = 0) -> Copy:
        self.marks.append(mark)
        self.copy = Copy(self)
        self.gates["copy"] = self.copy.ended
        self.reached["copy"].set()
        return self.copy

    def release(self, source: PullSource, outcome: str) -> Any:
        self.said.append(outcome)
        return self.gate("release") if outcome == "consumed" else None

    def cut(self, link: object, why: str) -> Any:
        self.said.append("cut")
        self.control.closed = True
        if self.copy is not None:
            self.copy._finish("cut")
        return asyncio.ensure_future(asyncio.sleep(0))

    async def drop(self, source: PullSource) -> None:
        self.said.append("drop")


class Stage:
    """A TransferTable before a scripted producer."""

    def __init__(self, **settings: float) -> None:
        self.reported: list[PullEnded] = []
        self.done = asyncio.Event()
        self.producer = Producer()
        config = SidecarConfig(socket="s", engine_id="e", **({"stop_grace_s": 0.1} | settings))  # type: ignore[arg-type]
        registration: Any = SimpleNamespace(layout=LAYOUT, region=SimpleNamespace(num_bytes=LAYOUT.pool_bytes))
        peers: Any = self.producer
        self.table = TransferTable(config, registration, peers, SidecarMetrics(), self._report)

    def _report(self, ended: PullEnded) -> None:
        if self.producer.copy is not None:
            assert self.producer.copy.ended.done(), "reported while something may still write"
        self.reported.append(ended)
        self.done.set()

    def begin(self, local: list[int] | None = None, first_block: int = 0, deadline_s: float = 30.0) -> None:
        self.table.begin(Pull("pull", (SOURCE,), [4, 5] if local is None else local, first_block, deadline_s))

    async def go_to(self, step: str) -> None:
        """Let the producer do everything before `step`."""
        results = {"connect": self.producer, "claim": Claimed(1, [0, 1], 32, 5.0), "copy": COPIED}
        for before in STEPS:
            await asyncio.wait_for(self.producer.reached[before].wait(), 5)
            if before == step:
                return
            self.producer.gates[before].set_result(results[before])

    async def end(self) -> PullEnded:
        await asyncio.wait_for(self.done.wait(), 5)
        for _ in range(5):
            await asyncio.sleep(0)
        [ended] = self.reported
        assert len(self.table) == 0
        return ended


async def test_the_happy_path() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("release")
    stage.producer.gates["release"].set_result(Done(2))
    ended = await stage.end()
    assert (ended.ok, ended.num_blocks, ended.num_bytes, ended.transport) == (True, 2, 20, "shm")
    assert stage.producer.said == ["consumed"] and not stage.producer.readers


async def test_no_blocks_no_copy() -> None:
    stage = Stage()
    stage.begin(local=[])
    await stage.go_to("claim")
    stage.producer.gates["claim"].set_result(Claimed(1, [], 0, 5.0))
    await asyncio.wait_for(stage.producer.reached["release"].wait(), 5)
    stage.producer.gates["release"].set_result(Done(2))
    assert (await stage.end()).ok and stage.producer.copy is None


@pytest.mark.parametrize("step", STEPS)
async def test_abandoned_at_each_step(step: str) -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to(step)
    stage.table.abandon("pull")
    stage.table.abandon("pull")
    if step == "release":  # too late to stop: it has been copied, and its confirmation is awaited
        stage.producer.gates["release"].set_result(Done(2))
        assert (await stage.end()).ok
        return
    ended = await stage.end()
    assert (ended.ok, ended.reason) == (False, "abandoned")
    assert stage.producer.said == (["stop", "drop"] if step == "copy" else ["drop"])


@pytest.mark.parametrize("step", STEPS)
async def test_out_of_time_at_each_step(step: str) -> None:
    stage = Stage()
    stage.begin(deadline_s=0.1)
    await stage.go_to(step)
    ended = await stage.end()
    assert (ended.ok, ended.reason) == (False, "timeout")
    said = {"connect": [], "claim": ["returned"], "copy": ["stop", "returned"], "release": ["consumed"]}
    assert stage.producer.said == said[step]


@pytest.mark.parametrize("step", STEPS)
async def test_the_engine_leaves_at_each_step(step: str) -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to(step)
    await asyncio.wait_for(stage.table.close("the engine is gone"), 5)
    ended = await stage.end()
    assert not ended.ok and "drop" not in stage.producer.said


@pytest.mark.parametrize("step", ["connect", "claim", "release"])
@pytest.mark.parametrize("reason", ["expired", "unknown", "wrong_token", "stale_epoch"])
async def test_refused_at_each_step(step: str, reason: str) -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to(step)
    stage.producer.gates[step].set_exception(Refusal(reason, "no"))
    ended = await stage.end()
    assert (ended.ok, ended.reason, ended.message) == (False, reason, "no")


async def test_a_stale_connection_is_replaced_once() -> None:
    stage = Stage()
    stage.begin()
    for number in (1, 2):
        await asyncio.wait_for(stage.producer.reached["connect"].wait(), 5)
        stage.producer.reached["connect"].clear()
        stage.producer.gates["connect"].set_result(stage.producer)
        await asyncio.wait_for(stage.producer.reached["claim"].wait(), 5)
        stage.producer.reached["claim"].clear()
        assert stage.producer.num_claims == number
        stage.producer.gates["claim"].set_exception(PeerLost("reset"))
    assert (await stage.end()).reason == "unreachable" and stage.producer.num_claims == 2


async def test_a_lost_peer_or_lease_stops_the_copy() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("copy")
    [reader] = stage.producer.readers
    assert isinstance(getattr(reader, "interrupt", None), Callable)  # type: ignore[arg-type]
    reader.interrupt("expired", "the lease ran out")  # type: ignore[attr-defined]
    reader.interrupt("unreachable", "and the peer died")  # type: ignore[attr-defined]
    ended = await stage.end()
    assert (ended.ok, ended.reason, ended.message) == (False, "expired", "the lease ran out")
    assert stage.producer.said == ["stop", "returned"]


async def test_a_failed_copy_cuts_the_peer_off_before_it_is_reported() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("copy")
    stage.producer.gates["copy"].set_result("status -1")
    ended = await stage.end()
    assert (ended.ok, ended.reason, ended.message) == (False, "transport", "status -1")
    assert stage.producer.said == ["cut"]


async def test_a_copy_that_does_not_stop_is_cut() -> None:
    stage = Stage()
    stage.producer.stubborn = True
    stage.begin()
    await stage.go_to("copy")
    stage.table.abandon("pull")
    assert (await stage.end()).reason == "abandoned"
    assert stage.producer.said == ["stop", "cut", "drop"]


@pytest.mark.parametrize(("local", "first_block"), [([0, 1, 2], 0), ([0, 1], 1), ([8], 0), ([1, 1], 0)])
async def test_a_pull_that_does_not_fit_the_lease_gives_it_back(local: list[int], first_block: int) -> None:
    stage = Stage()
    stage.begin(local, first_block)
    await stage.go_to("claim")
    stage.producer.gates["claim"].set_result(Claimed(1, [0, 1], 32, 5.0))
    assert (await stage.end()).reason == "invalid"
    assert stage.producer.said == ["returned"] and stage.producer.copy is None


async def test_a_producer_whose_lease_lies_outside_its_pool_is_not_read() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("claim")
    stage.producer.gates["claim"].set_result(Claimed(1, [0, 8], 32, 5.0))
    assert (await stage.end()).reason == "invalid" and stage.producer.copy is None


async def test_a_bug_is_reported_too() -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("claim")
    stage.producer.gates["claim"].set_exception(ZeroDivisionError("bug"))
    ended = await stage.end()
    assert ended.reason == "transport" and "ZeroDivisionError" in ended.message


async def test_limits_and_ids() -> None:
    stage = Stage(max_pulls=1)
    stage.begin()
    with pytest.raises(FrameError, match="open already"):
        stage.begin()
    stage.table.begin(Pull("other", (SOURCE,), [1], 0, 30.0))
    await asyncio.wait_for(stage.done.wait(), 5)
    assert (stage.reported[0].pull_id, stage.reported[0].reason) == ("other", "invalid")
    await stage.table.close("done")


async def computing(stage: Stage, ready: Ready) -> None:
    """Claimed, and computed as far as `ready`."""
    stage.begin()
    await stage.go_to("claim")
    stage.producer.gates["claim"].set_result(Claimed(1, [0, 1], 32, 5.0, ready))


async def test_a_lease_that_is_still_computed_is_copied_part_by_part() -> None:
    stage = Stage()
    await computing(stage, Ready(1, 1))
    for mark in (Ready(2, 2), None):
        await asyncio.wait_for(stage.producer.reached["copy"].wait(), 5)
        assert not stage.producer.reached["release"].is_set()
        stage.producer.reached["copy"].clear()
        stage.producer.gates["copy"].set_result(COPIED)
        await asyncio.sleep(0)
        if mark is not None:
            stage.producer.follower(Computed("t", mark))
    await asyncio.wait_for(stage.producer.reached["release"].wait(), 5)
    stage.producer.gates["release"].set_result(Done(2))
    ended = await stage.end()
    assert (ended.ok, ended.num_bytes) == (True, 20) and not stage.producer.readers
    assert stage.producer.follower is None


async def test_a_lease_whose_blocks_come_while_it_is_computed() -> None:
    """Also those that come right behind the answer to the claim, before it is taken."""
    stage = Stage()
    stage.begin()
    await stage.go_to("claim")
    stage.producer.gates["claim"].set_result(Claimed(1, [], 32, 5.0, Ready(), 2))
    stage.producer.follower(Computed("t", Ready(1, 1), (0,)))
    await asyncio.wait_for(stage.producer.reached["copy"].wait(), 5)
    stage.producer.reached["copy"].clear()
    stage.producer.gates["copy"].set_result(COPIED)
    await asyncio.sleep(0)
    stage.producer.follower(Computed("t", Ready(2, 2), (1,)))
    await asyncio.wait_for(stage.producer.reached["copy"].wait(), 5)
    stage.producer.gates["copy"].set_result(COPIED)
    await asyncio.wait_for(stage.producer.reached["release"].wait(), 5)
    stage.producer.gates["release"].set_result(Done(2))
    ended = await stage.end()
    assert (ended.ok, ended.num_bytes) == (True, 20)


@pytest.mark.parametrize(("num_blocks", "reason"), [(1, "invalid"), (2, "transport")])
async def test_a_lease_that_is_too_short_or_marked_without_its_blocks(num_blocks: int, reason: str) -> None:
    stage = Stage()
    stage.begin()
    await stage.go_to("claim")
    stage.producer.gates["claim"].set_result(Claimed(1, [0], 32, 5.0, Ready(), num_blocks))
    stage.producer.follower(Computed("t", Ready(2, 2)))
    ended = await stage.end()
    assert (ended.ok, ended.reason) == (False, reason)
    assert stage.producer.copy is None


@pytest.mark.parametrize("why", ["withdrawn", "abandoned", "timeout", "nonsense"])
async def test_a_lease_that_is_never_computed_to_its_end(why: str) -> None:
    stage = Stage()
    await computing(stage, Ready())
    while stage.producer.follower is None or not stage.producer.readers:  # noqa: ASYNC110  (loop turns, not time)
        await asyncio.sleep(0)
    if why == "withdrawn":
        stage.producer.follower(Withdrawn("t", "released", "taken back"))
    elif why == "abandoned":
        stage.table.abandon("pull")
    elif why == "timeout":
        stage.table.supersede("pull")
    else:
        stage.producer.follower(Computed("t", Ready(7, 9, 1)))
    ended = await stage.end()
    reason = {"withdrawn": "released", "nonsense": "transport"}.get(why, "abandoned")
    assert (ended.ok, ended.reason) == (False, reason)
    assert stage.producer.said == (["drop"] if why == "abandoned" else ["returned"])
    assert stage.producer.copy is None and stage.producer.follower is None

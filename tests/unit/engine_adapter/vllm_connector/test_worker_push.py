"""Marks from within a forward, as vLLM's hooks come, and landings whose metaserver is not there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from engine_adapter import mark_pace
from engine_adapter.vllm_connector.metadata import BatonMetadata, LandOrder, MarkOrder
from engine_adapter.vllm_connector.worker_push import LayerMarks, WorkerLandings
from engine_adapter.vllm_connector.worker_side import WorkerSide
from sidecar.protocol import Event, KvLayout, Landing, Plane, PullEnded, Ready

LAYERS = ["a", "b", "c"]
LAYOUT = KvLayout(
    num_blocks=8, block_size=16, planes=(Plane(0, 300, 300),), num_layers=3, num_kv_heads=2, head_dim=8,
    dtype="float32", model="m", order="x",
)  # fmt: skip


class Link:
    """What the worker's part of a push uses of a SidecarLink."""

    epoch = "one"
    client = None

    def __init__(self) -> None:
        self.marked: list[tuple[str, Ready]] = []
        self.got_blocks: list[tuple[str, tuple[int, ...]]] = []
        self.landed: list[tuple[str, list[int], int, float]] = []
        self.abandoned: list[str] = []
        self.events: list[Event] = []

    def mark_ready(self, transfer_id: str, ready: Ready, block_ids: tuple[int, ...]) -> None:
        if block_ids:
            self.got_blocks.append((transfer_id, block_ids))
        if ready.end_block:
            self.marked.append((transfer_id, ready))

    def land(self, pull_id: str, blocks: list[int], first_block: int, deadline_s: float) -> Landing | None:
        self.landed.append((pull_id, blocks, first_block, deadline_s))
        return Landing(1, "l", "token", "one", 1e9)

    def abandon(self, pull_id: str) -> None:
        self.abandoned.append(pull_id)

    def poll(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def overdue_s(self) -> float:
        return 0.0


class Device:
    """A device that computes a layer when `now_done` grows."""

    def __init__(self) -> None:
        self.num_queued = 0
        self.num_done = 0
        self.waits = 0

    def now(self) -> Callable[[], bool]:
        self.num_queued += 1
        mine = self.num_queued
        return lambda: self.num_done >= mine

    def wait(self) -> None:
        self.waits += 1
        self.num_done = self.num_queued


class Cpu:
    def now(self) -> Callable[[], bool]:
        return lambda: True

    def wait(self) -> None:
        raise AssertionError("nothing to wait for")


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    monkeypatch.setattr(mark_pace, "MIN_MARK_BYTES", 1)
    return Link()


def marks_of(link: Link, progress: Cpu | Device | None = None, *, by_layer: bool = True) -> LayerMarks:
    return LayerMarks(link, LAYERS, LAYOUT, progress or Cpu(), by_layer=by_layer)  # type: ignore[arg-type]


def run(marks: LayerMarks, *orders: MarkOrder, layers: list[str] = LAYERS) -> None:
    marks.begin(orders)
    for layer in layers:
        marks.layer_written(layer)
    marks.step_ended()


def test_each_layer_is_marked_as_it_is_written(link: Link) -> None:
    marks = marks_of(link)
    run(marks, MarkOrder("t", 2, 5, (7, 8, 9)), MarkOrder("u", 0, 1, (3,)))
    assert link.got_blocks == [("t", (7, 8, 9)), ("u", (3,))]
    assert [ready for name, ready in link.marked if name == "t"] == [
        Ready(2, 2, 0), Ready(2, 5, 1), Ready(2, 5, 2), Ready(2, 5, 3),
    ]  # fmt: skip
    assert [ready for name, ready in link.marked if name == "u"] == [Ready(0, 1, 1), Ready(0, 1, 2), Ready(0, 1, 3)]
    run(marks)  # a step without a push
    assert len(link.marked) == 7


def test_what_is_computed_already_is_told_as_the_step_begins(link: Link) -> None:
    marks = marks_of(link)
    run(marks, MarkOrder("t", 3, 3, (7, 8, 9)))
    assert link.marked == [("t", Ready(3, 3, 0))] and link.got_blocks == [("t", (7, 8, 9))]


def test_small_layers_are_marked_together(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mark_pace, "MIN_MARK_BYTES", 1 << 20)
    run(marks_of(link), MarkOrder("t", 0, 5, ()))
    assert link.marked == [("t", Ready(0, 5, 3))]


def test_only_layers_without_a_gap_count(link: Link) -> None:
    run(marks_of(link), MarkOrder("t", 0, 5, ()), layers=["b", "a", "c"])
    assert [ready.num_layers for _, ready in link.marked] == [2, 3]


@pytest.mark.parametrize(("by_layer", "layers"), [(False, LAYERS), (True, [])])
def test_without_usable_hooks_all_is_marked_at_the_end(link: Link, by_layer: bool, layers: list[str]) -> None:
    marks = marks_of(link, by_layer=by_layer)
    marks.begin([MarkOrder("t", 0, 5, ())])
    for layer in layers:
        marks.layer_written(layer)
    assert not link.marked
    marks.step_ended()
    assert link.marked == [("t", Ready(0, 5, 3))]


def test_a_forward_that_fails_marks_nothing_more(link: Link) -> None:
    """vLLM calls wait_for_save in a `finally`."""
    marks = marks_of(link)
    marks.begin([MarkOrder("t", 0, 5, ())])
    marks.layer_written("a")

    def forward() -> None:
        try:
            raise RuntimeError("out of memory")
        finally:
            marks.step_ended()

    with pytest.raises(RuntimeError):
        forward()
    assert link.marked == [("t", Ready(0, 5, 1))]
    run(marks)
    assert len(link.marked) == 1


def test_on_a_device_a_layer_is_marked_when_it_is_computed(link: Link) -> None:
    device = Device()
    marks = marks_of(link, device)
    marks.begin([MarkOrder("t", 0, 5, ())])
    marks.layer_written("a")
    marks.layer_written("b")
    assert not link.marked  # queued, not computed
    device.num_done = 2  # what was queued before, and the first layer
    marks.layer_written("c")
    assert link.marked == [("t", Ready(0, 5, 1))]
    marks.step_ended()
    assert [ready.num_layers for _, ready in link.marked] == [1, 2, 3] and device.waits == 1


def landing(*blocks: int, metaserver: str = "http://127.0.0.1:9/v1/metaserver") -> BatonMetadata:
    return BatonMetadata(lands=[LandOrder("r-1", "r", metaserver, blocks, 2, 60)])


def worker(link: Link) -> tuple[WorkerSide, threading.Event]:
    news = threading.Event()
    landings = WorkerLandings(link, 16, 7.0, news)  # type: ignore[arg-type]
    return WorkerSide(link, 0, 30.0, news, landings=landings), news  # type: ignore[arg-type]


def test_a_landing_ends_like_a_pull(link: Link) -> None:
    side, _ = worker(link)
    side.begin(landing(5, 6))
    assert link.landed == [("r-1", [5, 6], 2, 7.0)]
    link.events = [PullEnded("r-1", True, "", "", 2, 9, 0.1, "shm", "p@h:1")]
    ended = side.poll()
    assert ended.received == {"r-1"} and not ended.failed
    side._landings.close()  # type: ignore[union-attr]


def test_an_aborted_landing_is_abandoned_and_reported_once(link: Link) -> None:
    side, _ = worker(link)
    meta = landing(5, 6)
    meta.abandoned, meta.abandoned_as_sent = ["r-1"], ["r-1"]
    side.begin(meta)
    assert link.abandoned == ["r-1"]
    link.events = [PullEnded("r-1", False, "abandoned", "", 2, 0, 0.1, "", "")]
    ended = side.poll()
    assert ended.sent == {"r-1"} and not ended.received and not ended.failed_blocks
    assert side.poll().sent == set()
    side._landings.close()  # type: ignore[union-attr]


def test_a_landing_that_nobody_can_be_asked_to_fill_fails_at_once(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    class Linked(Link):
        class client:
            class hello:
                engine_id, host, port = "d", "127.0.0.1", 7000

    linked = Linked()
    side, news = worker(linked)
    side.begin(landing(5, 6))
    deadline = time.monotonic() + 30
    while not linked.abandoned and time.monotonic() < deadline:
        news.wait(1)
        side.poll()
    assert linked.abandoned == ["r-1"]
    linked.events = [PullEnded("r-1", False, "abandoned", "the engine abandoned it", 2, 0, 0.1, "", "")]
    ended = side.poll()
    assert ended.received == ended.failed == {"r-1"} and ended.failed_blocks == {5, 6}
    assert "reason=metaserver" in caplog.text and "127.0.0.1:9" in caplog.text
    side._landings.close()  # type: ignore[union-attr]


def test_a_prompt_that_wants_nothing_lands_nothing(link: Link) -> None:
    side, _ = worker(link)
    side.begin(landing())
    assert not link.landed and not side._loads
    side._landings.close()  # type: ignore[union-attr]

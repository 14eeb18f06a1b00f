"""The worker's side reports every id once, whatever its sidecar does, over a link that is told what happens."""

from __future__ import annotations

import threading

import pytest

from engine_adapter.kv_transfer_params import KvSource
from engine_adapter.vllm_connector import worker_side
from engine_adapter.vllm_connector.metadata import BatonMetadata, OfferNote, PullOrder
from engine_adapter.vllm_connector.worker_side import Ended, SidecarHangs, WorkerSide
from sidecar.protocol import Event, OfferEnded, PullEnded, PullSource, SidecarLost

SOURCE = KvSource("p", "h", 1, "t", "secret", "far")


class Link:
    """What WorkerSide uses of a SidecarLink."""

    def __init__(self) -> None:
        self.epoch = "one"
        self.events: list[Event] = []
        self.pulled: list[tuple[str, int]] = []
        self.abandoned: list[str] = []
        self.dropped: list[str] = []
        self.late_s = 0.0

    def pull(
        self, pull_id: str, sources: list[PullSource], blocks: list[int], first_block: int, deadline_s: float
    ) -> None:
        self.pulled.append((pull_id, len(sources)))

    def abandon(self, pull_id: str) -> None:
        self.abandoned.append(pull_id)

    def drop(self, source: PullSource) -> None:
        self.dropped.append(source.transfer_id)

    def overdue_s(self) -> float:
        return self.late_s

    def poll(self) -> list[Event]:
        events, self.events = self.events, []
        return events


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def side(link: Link) -> WorkerSide:
    return WorkerSide(link, 0, 30.0, threading.Event())  # type: ignore[arg-type]


def pull(request_id: str, num_ranks: int = 1) -> BatonMetadata:
    return BatonMetadata(pulls=[PullOrder(request_id, (SOURCE,) * num_ranks, 2, (5, 6), 0)])


def offer(request_id: str, transfer_id: str, epoch: str = "one") -> BatonMetadata:
    return BatonMetadata(offers=[OfferNote(request_id, ((transfer_id, epoch),))])


def pull_ended(request_id: str, ok: bool = True) -> PullEnded:
    return PullEnded(request_id, ok, "" if ok else "expired", "", 2, 9, 0.1, "shm", "p@h:1")


def test_a_load_is_reported_once(side: WorkerSide, link: Link) -> None:
    side.begin(pull("r"))
    assert side.poll() == Ended()
    link.events = [pull_ended("r"), pull_ended("r")]
    assert side.poll() == Ended(received={"r"})
    assert side.poll() == Ended()


def test_a_failed_load_is_received_too_and_names_its_blocks(side: WorkerSide, link: Link) -> None:
    side.begin(pull("r"))
    link.events = [pull_ended("r", ok=False)]
    assert side.poll() == Ended(received={"r"}, failed={"r"}, failed_blocks={5, 6})


def test_every_rank_s_lease_goes_to_the_sidecar_which_knows_what_to_read(side: WorkerSide, link: Link) -> None:
    side.begin(pull("r", num_ranks=2))
    assert link.pulled == [("r", 2)] and not link.dropped


def test_an_abandoned_load_is_reported_when_it_has_ended(side: WorkerSide, link: Link) -> None:
    side.begin(pull("r"))
    side.begin(BatonMetadata(abandoned=["r"]))
    assert link.abandoned == ["r"]
    assert side.poll() == Ended()
    link.events = [pull_ended("r", ok=False)]
    assert side.poll().received == {"r"}


def test_older_versions_hear_of_an_abandoned_load_as_sent(side: WorkerSide, link: Link) -> None:
    side.begin(pull("r"))
    side.begin(BatonMetadata(abandoned=["r"], abandoned_as_sent=["r"]))
    link.events = [pull_ended("r", ok=False)]
    assert side.poll() == Ended(sent={"r"})
    side.begin(BatonMetadata(abandoned=["gone"], abandoned_as_sent=["gone"]))
    assert side.poll() == Ended(sent={"gone"})


def test_an_offer_is_sent_when_its_lease_has_ended(side: WorkerSide, link: Link) -> None:
    side.begin(offer("r", "t1"))
    assert side.poll() == Ended()
    link.events = [OfferEnded("t1", "consumed")]
    assert side.poll() == Ended(sent={"r"})
    assert side.poll() == Ended()


def test_a_lease_may_end_before_the_scheduler_has_told_of_it(side: WorkerSide, link: Link) -> None:
    link.events = [OfferEnded("t1", "consumed")]
    assert side.poll() == Ended()
    side.begin(offer("r", "t1"))
    assert side.poll() == Ended(sent={"r"})


def test_a_lost_sidecar_voids_its_offers(side: WorkerSide, link: Link) -> None:
    side.begin(offer("r", "t1"))
    side.poll()
    link.epoch, link.events = "", [SidecarLost("killed")]
    assert side.poll() == Ended(sent={"r"})
    side.begin(offer("late", "t2"))  # of the lost sidecar, told only now
    side.begin(offer("new", "t3", epoch="two"))  # of its successor, which this worker has not linked to yet
    assert side.poll() == Ended(sent={"late"})
    link.epoch = "two"
    assert side.poll() == Ended()
    link.events = [OfferEnded("t3", "expired")]
    assert side.poll() == Ended(sent={"new"})


def test_an_offer_of_a_registration_nobody_saw_is_void_after_a_while(
    side: WorkerSide, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    side.begin(offer("r", "t1", epoch="between"))
    assert side.poll() == Ended()
    monkeypatch.setattr(worker_side, "STRANGE_EPOCH_S", -1.0)
    assert side.poll() == Ended(sent={"r"})


def test_a_rank_that_was_never_asked_has_sent(link: Link) -> None:
    side = WorkerSide(link, 1, 30.0, threading.Event())  # type: ignore[arg-type]
    side.begin(offer("r", "t1"))
    assert side.poll() == Ended(sent={"r"})


def test_a_sidecar_that_cannot_be_stopped_ends_the_engine(side: WorkerSide, link: Link) -> None:
    link.late_s = 1e3
    with pytest.raises(SidecarHangs, match="restart"):
        side.poll()

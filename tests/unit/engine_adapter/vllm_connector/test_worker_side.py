"""The worker's side reports every id once, whatever its sidecar does, over a link that is told what happens."""

from __future__ import annotations

import threading

import pytest

from engine_adapter.kv_transfer_params import KvSource
from engine_adapter.vllm_connector import worker_side
from engine_adapter.vllm_connector.metadata import (
    BatonMetadata,
    OfferNote,
    PullOrder,
    StoreLoadOrder,
    StoreSaveOrder,
)
from engine_adapter.vllm_connector.worker_side import Ended, SidecarHangs, WorkerSide
from sidecar.protocol import (
    Event,
    OfferEnded,
    PullEnded,
    PullSource,
    SidecarLost,
    StoreAbandon,
    StoreLoad,
    StoreLoadEnded,
    StoreRequest,
    StoreSave,
    StoreSaveEnded,
)

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
        self.asked: list[StoreRequest] = []

    def pull(
        self, pull_id: str, sources: list[PullSource], blocks: list[int], first_block: int, deadline_s: float
    ) -> None:
        self.pulled.append((pull_id, len(sources)))

    def abandon(self, pull_id: str) -> None:
        self.abandoned.append(pull_id)

    def ask_store(self, request: StoreRequest, within_s: float) -> None:
        self.asked.append(request)

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


def stored_load(request_id: str) -> BatonMetadata:
    return BatonMetadata(store_loads=[StoreLoadOrder(request_id, (b"x" * 32, b"y" * 32, b"z" * 32), (5, 6, 7))])


def stored_load_ended(request_id: str, num_blocks: int) -> StoreLoadEnded:
    return StoreLoadEnded(request_id, num_blocks, [5, 6, 7][num_blocks:], "", "", 9, 0.1, {"posix": num_blocks})


def stored_save(request_id: str) -> StoreSaveOrder:
    return StoreSaveOrder(request_id, (b"x" * 32,), (5,))


@pytest.mark.parametrize(("num_blocks", "missing"), [(3, set()), (1, {6, 7}), (0, {5, 6, 7})])
def test_a_load_from_the_store_is_received_and_what_it_lacks_is_named(
    side: WorkerSide, link: Link, num_blocks: int, missing: set[int]
) -> None:
    side.begin(stored_load("r"))
    assert link.asked == [StoreLoad("r", [b"x" * 32, b"y" * 32, b"z" * 32], [5, 6, 7], 5.0)]
    link.events = [stored_load_ended("r", num_blocks), stored_load_ended("r", num_blocks)]
    assert side.poll() == Ended(received={"r"}, missing_blocks=missing)
    assert side.poll() == Ended()


@pytest.mark.parametrize("as_sent", [False, True])
def test_an_abandoned_load_from_the_store_is_reported_when_it_has_ended(
    side: WorkerSide, link: Link, as_sent: bool
) -> None:
    side.begin(stored_load("r"))
    side.begin(BatonMetadata(abandoned=["r"], abandoned_as_sent=["r"] if as_sent else []))
    assert link.asked[1:] == [StoreAbandon("r")] and not link.abandoned
    assert side.poll() == Ended()
    link.events = [stored_load_ended("r", 0)]
    ended = side.poll()
    assert (ended.sent, ended.received) == (({"r"}, set()) if as_sent else (set(), {"r"}))


def test_a_saved_request_is_sent_when_its_blocks_are_read(side: WorkerSide, link: Link) -> None:
    side.begin(BatonMetadata(store_saves=[stored_save("r")]))
    assert link.asked == [StoreSave("r", [b"x" * 32], [5])]
    assert side.poll() == Ended()
    link.events = [StoreSaveEnded("r", 1, 0, "")]
    assert side.poll() == Ended(sent={"r"})
    assert side.poll() == Ended()


@pytest.mark.parametrize("offer_first", [True, False])
def test_a_request_that_is_saved_and_handed_on_is_sent_once(side: WorkerSide, link: Link, offer_first: bool) -> None:
    meta = offer("r", "t1")
    meta.store_saves.append(stored_save("r"))
    side.begin(meta)
    ends: list[Event] = [OfferEnded("t1", "consumed"), StoreSaveEnded("r", 0, 1, "")]
    for event in ends if offer_first else reversed(ends):
        assert side.poll() == Ended()
        link.events = [event]
    assert side.poll() == Ended(sent={"r"})


def test_a_lease_that_ended_early_waits_for_the_save(side: WorkerSide, link: Link) -> None:
    link.events = [OfferEnded("t1", "consumed")]
    side.poll()
    meta = offer("r", "t1")
    meta.store_saves.append(stored_save("r"))
    side.begin(meta)
    assert side.poll() == Ended()
    link.events = [StoreSaveEnded("r", 1, 0, "")]
    assert side.poll() == Ended(sent={"r"})

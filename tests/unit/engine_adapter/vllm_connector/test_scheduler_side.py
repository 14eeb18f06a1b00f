"""What the scheduler's side loads, hands on, drops and reports, over a link that only remembers."""

from __future__ import annotations

from typing import Any

import pytest

from engine_adapter.kv_transfer_params import RemotePrefill
from engine_adapter.vllm_connector import scheduler_side
from engine_adapter.vllm_connector.scheduler_side import SchedulerSide
from sidecar.errors import OfferRefused
from sidecar.protocol import PROTOCOL_VERSION, Offer, PullSource, SidecarHello
from tests.unit.engine_adapter.vllm_connector.fake_vllm import request

DECODE = {"do_remote_decode": True}


class Client:
    """A sidecar that leases everything, unless it is told to refuse."""

    def __init__(self, rank: int) -> None:
        self.hello = SidecarHello("p", rank, "127.0.0.1", 7000 + rank, ("shm",), "s", PROTOCOL_VERSION)
        self.refuses = False
        self.offered: list[tuple[str, list[int], int]] = []

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, ttl_s: float) -> Offer:
        if self.refuses:
            raise OfferRefused("too many leases")
        self.offered.append((request_id, block_ids, num_tokens))
        return Offer(f"t{self.hello.rank}-{len(self.offered)}", "secret", "epoch", 1e9)


class Link:
    """What SchedulerSide uses of a SidecarLink."""

    def __init__(self, rank: int = 0) -> None:
        self.client: Client | None = Client(rank)
        self.dropped: list[PullSource] = []
        self.revoked: list[str] = []

    def poll(self) -> list[Any]:
        return []

    def drop(self, source: PullSource) -> None:
        self.dropped.append(source)

    def revoke(self, transfer_id: str) -> None:
        self.revoked.append(transfer_id)


def lease(num_tokens: int = 40, num_blocks: int = 3, **more: Any) -> dict[str, Any]:
    remote = RemotePrefill("p", "r", "h", 1, tuple(range(num_blocks)), num_tokens, 0, 1e9, "t", "secret", "epoch")
    return {**remote.to_wire(), **more}


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def side(link: Link) -> SchedulerSide:
    return SchedulerSide([link], "kv_both", 16, 30.0)  # type: ignore[list-item]


def test_a_whole_prompt_is_loaded(side: SchedulerSide) -> None:
    asked = request("r", lease())
    assert side.num_new_matched_tokens(asked, 0) == (40, True)
    assert side.num_new_matched_tokens(asked, 0) == (40, True)  # asked again while blocks are short
    side.allocated(asked, [7, 8, 9, 10], 40)
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    side.allocated(asked, [], 0)  # vLLM tells a second time, after the load
    (order,) = side.next_meta().pulls
    assert (order.local_block_ids, order.first_block, order.num_blocks) == ((7, 8, 9), 0, 3)
    assert not side.next_meta().pulls


def test_what_the_decoder_has_is_not_loaded(side: SchedulerSide) -> None:
    asked = request("r", lease())
    assert side.num_new_matched_tokens(asked, 32) == (8, True)
    side.allocated(asked, [7, 8, 9], 8)
    (order,) = side.next_meta().pulls
    assert (order.local_block_ids, order.first_block) == ((9,), 2)


def test_a_longer_prompt_loads_whole_blocks(side: SchedulerSide) -> None:
    asked = request("r", lease(), num_tokens=60)
    assert side.num_new_matched_tokens(asked, 0) == (32, True)
    side.allocated(asked, [7, 8, 9, 10], 32)
    (order,) = side.next_meta().pulls
    assert order.local_block_ids == (7, 8)


@pytest.mark.parametrize(
    "params", [lease(num_tokens=41), lease(num_blocks=4), lease(release_only=True), lease(num_tokens=90, num_blocks=6)]
)
def test_a_lease_that_does_not_fit_is_dropped_and_recomputed(
    side: SchedulerSide, link: Link, params: dict[str, Any]
) -> None:
    asked = request("r", params)
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    side.allocated(asked, [], 0)
    assert [source.transfer_id for source in link.dropped] == ["t"]
    side.finished(asked, [1, 2, 3])
    assert len(link.dropped) == 1


def test_incomplete_parameters_are_recomputed(side: SchedulerSide, link: Link) -> None:
    asked = request("r", {"do_remote_prefill": True})
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    side.allocated(asked, [], 0)
    assert side.finished(asked, []) == (False, None)
    assert not link.dropped


def test_a_request_that_never_got_blocks_gives_its_lease_back(side: SchedulerSide, link: Link) -> None:
    """Also how vLLM tells of a request that its API server refused (kv-contracts 1.6)."""
    assert side.finished(request("r", lease(), status="FINISHED_ABORTED"), []) == (False, None)
    assert len(link.dropped) == 1


def test_a_release_is_done_on_arrival(side: SchedulerSide, link: Link) -> None:
    asked = request("r", lease(release_only=True))
    side.new_request(asked)
    assert len(link.dropped) == 1
    side.allocated(asked, [], 0)
    side.finished(asked, [])
    assert len(link.dropped) == 1


@pytest.mark.parametrize("keeps", [True, False])
def test_an_aborted_load_is_stopped_and_its_blocks_stay(
    side: SchedulerSide, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_side, "ABORTED_LOAD_KEEPS_ITS_BLOCKS", keeps)
    asked = request("r", lease())
    side.allocated(asked, [7, 8, 9], 40)
    side.next_meta()
    assert side.finished(asked, [7, 8, 9]) == (not keeps, None)
    meta = side.next_meta()
    assert meta.abandoned == ["r"]
    assert meta.abandoned_as_sent == ([] if keeps else ["r"])


def test_a_load_that_has_ended_is_not_stopped(side: SchedulerSide) -> None:
    asked = request("r", lease())
    side.allocated(asked, [7, 8, 9], 40)
    side.next_meta()
    side.received(["r"])
    assert side.finished(asked, [7, 8, 9]) == (False, None)
    assert not side.next_meta().abandoned


@pytest.mark.parametrize("status", ["FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED"])
def test_a_finished_prefill_is_handed_on(side: SchedulerSide, link: Link, status: str) -> None:
    delayed, params = side.finished(request("r", DECODE, status=status), [4, 5, 6, 7])
    assert delayed and params is not None
    assert params["remote_block_ids"] == [[4, 5, 6]]
    assert params["remote_num_tokens"] == 40
    assert link.client is not None and link.client.offered == [("r", [4, 5, 6], 40)]
    (note,) = side.next_meta().offers
    assert (note.request_id, note.leases) == ("r", (("t0-1", "epoch"),))


def test_an_aborted_prefill_is_not_handed_on(side: SchedulerSide) -> None:
    assert side.finished(request("r", DECODE, status="FINISHED_ABORTED"), [4]) == (False, None)


def test_without_a_sidecar_nothing_is_handed_on(side: SchedulerSide, link: Link) -> None:
    link.client = None
    assert side.finished(request("r", DECODE, status="FINISHED_STOPPED"), [4]) == (False, None)


def test_roles_keep_to_their_side() -> None:
    producer = SchedulerSide([Link()], "kv_producer", 16, 30.0)  # type: ignore[list-item]
    assert producer.num_new_matched_tokens(request("r", lease()), 0) == (0, False)
    consumer = SchedulerSide([Link()], "kv_consumer", 16, 30.0)  # type: ignore[list-item]
    assert consumer.finished(request("r", DECODE, status="FINISHED_STOPPED"), [4]) == (False, None)


def test_every_rank_offers() -> None:
    side = SchedulerSide([Link(0), Link(1)], "kv_both", 16, 30.0)  # type: ignore[list-item]
    delayed, params = side.finished(request("r", DECODE, status="FINISHED_STOPPED"), [4, 5, 6])
    assert delayed and params is not None and params["tp_size"] == 2
    decoder = SchedulerSide([Link(0), Link(1)], "kv_both", 16, 30.0)  # type: ignore[list-item]
    decoder.allocated(request("d", params), [1, 2, 3], 40)
    (order,) = decoder.next_meta().pulls
    assert [(source.port, source.transfer_id) for source in order.sources] == [(7000, "t0-1"), (7001, "t1-1")]


def test_a_rank_that_refuses_voids_the_others() -> None:
    first, second = Link(0), Link(1)
    assert second.client is not None
    second.client.refuses = True
    side = SchedulerSide([first, second], "kv_both", 16, 30.0)  # type: ignore[list-item]
    assert side.finished(request("r", DECODE, status="FINISHED_STOPPED"), [4, 5, 6]) == (True, None)
    assert first.revoked == ["t0-1"]
    assert side.next_meta().offers[0].leases == (("t0-1", "epoch"),)

"""What is landed, leased and marked for layerwise push, and when leases end, over a link that only remembers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.push_params import PushLanding
from engine_adapter.vllm_connector import compat, scheduler_side
from engine_adapter.vllm_connector.metadata import MarkOrder
from engine_adapter.vllm_connector.scheduler_push import SchedulerPush
from engine_adapter.vllm_connector.scheduler_side import SchedulerSide
from sidecar.errors import OfferRefused
from sidecar.protocol import Offer, PushTarget, Ready
from tests.unit.engine_adapter.vllm_connector.fake_vllm import request

TO_METASERVER = {"do_remote_prefill": True, "do_remote_decode": False, "metaserver": "http://127.0.0.1:8000/v1/m"}
NAME = "cmpl-r-0"
ID = f"{NAME}-0123abcd"
"""As vLLM 0.14 and later make it of NAME."""


class Client:
    def __init__(self, link: Link) -> None:
        self.link = link
        self.refuses = False
        self.pushed: list[tuple[str, int, int, PushTarget]] = []

    def push(
        self, request_id: str, block_ids: tuple[int, ...], num_tokens: int, ttl_s: float, target: PushTarget,
        ready: Ready, num_blocks: int,
    ) -> Offer:  # fmt: skip
        assert (block_ids, ready) == ((), Ready())
        if self.refuses:
            raise OfferRefused("too many leases")
        self.pushed.append((request_id, num_tokens, num_blocks, target))
        number = len(self.pushed)
        return Offer(f"t{number}", "secret", self.link.epoch or "epoch", 1e9)


class Link:
    """What SchedulerPush uses of a SchedulerLink."""

    def __init__(self) -> None:
        self.client: Client | None = Client(self)
        self.epoch = "epoch"
        self.revoked: list[str] = []
        self.revoked_now: list[str] = []
        self.dropped: list[Any] = []

    def poll(self) -> list[Any]:
        return []

    def revoke(self, transfer_id: str) -> None:
        self.revoked.append(transfer_id)

    def revoke_now(self, transfer_id: str) -> None:
        self.revoked_now.append(transfer_id)

    def drop(self, source: Any) -> None:
        self.dropped.append(source)

    def close(self) -> None: ...


@pytest.fixture
def link() -> Link:
    return Link()


def side_of(link: Link, kv_role: str = "kv_both", fault: str = "") -> SchedulerSide:
    push = SchedulerPush([link], kv_role, 16, 30.0, fault)  # type: ignore[list-item]
    return SchedulerSide([link], kv_role, 16, 30.0, push=push)  # type: ignore[list-item]


@pytest.fixture
def side(link: Link) -> SchedulerSide:
    return side_of(link)


def landing(num_tokens: int = 40, num_blocks: int = 3, name: str = NAME, landing_id: str = "l") -> dict[str, Any]:
    first = 0 if landing_id else num_blocks
    landed = PushLanding(
        name, "d", "h", 7, (1, 2, 3), 16, num_tokens, first, num_blocks, landing_id, "token", "far"
    )  # fmt: skip
    return landed.to_wire()


def step(request_id: str, computed: int, num_tokens: int, block_ids: list[int], *, resumed: bool = False) -> Any:
    """A step of vLLM 0.32 that computes tokens of one request."""
    new = [SimpleNamespace(req_id=request_id, block_ids=(block_ids,), num_computed_tokens=computed)]
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    if (computed and computed % 16 == 0) or resumed:
        new, cached.req_ids, cached.new_block_ids = [], [request_id], [(block_ids,)]
        cached.num_computed_tokens, cached.resumed_req_ids = [computed], {request_id} if resumed else set()
    return SimpleNamespace(
        scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens={request_id: num_tokens}
    )


# A decoder.


@pytest.mark.parametrize(("num_tokens", "landed"), [(40, 3), (33, 2), (32, 2), (2, 1)])
def test_a_decoder_lands_all_but_what_the_last_token_alone_is_in(
    side: SchedulerSide, num_tokens: int, landed: int
) -> None:
    asked = request(ID, TO_METASERVER, num_tokens)
    assert side.num_new_matched_tokens(asked, 0) == (num_tokens, True)
    side.allocated(asked, [7, 8, 9][: -(-num_tokens // 16)], num_tokens)
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    side.allocated(asked, [], 0)  # vLLM tells a second time, after the load
    (order,) = side.next_meta().lands
    assert (order.request_id, order.name, order.metaserver) == (ID, NAME, TO_METASERVER["metaserver"])
    assert (order.local_block_ids, order.first_block, order.num_tokens) == ((7, 8, 9)[:landed], 0, num_tokens)
    assert not side.next_meta().lands


def test_what_the_decoder_has_is_not_asked_for(side: SchedulerSide) -> None:
    asked = request(ID, TO_METASERVER, 40)
    assert side.num_new_matched_tokens(asked, 32) == (8, True)
    side.allocated(asked, [7, 8, 9], 8)
    (order,) = side.next_meta().lands
    assert (order.local_block_ids, order.first_block) == ((9,), 2)


@pytest.mark.parametrize(("num_tokens", "cached"), [(33, 32), (1, 0)])
def test_nothing_is_asked_for_where_only_the_last_token_is_missing(
    side: SchedulerSide, num_tokens: int, cached: int
) -> None:
    asked = request(ID, TO_METASERVER, num_tokens)
    assert side.num_new_matched_tokens(asked, cached) == (0, False)
    side.allocated(asked, [7, 8, 9], 0)
    assert not side.next_meta().lands


@pytest.mark.parametrize(("name", "more"), [("cmpl-r-0", {"num_children": 2}), ("cmpl-r-1", {})])
def test_of_a_list_it_tells_that_it_wants_nothing(side: SchedulerSide, name: str, more: dict[str, Any]) -> None:
    """The others of the list wait for its call."""
    asked = request(f"{name}-0123abcd", {**TO_METASERVER, **more}, 33)
    side.allocated(asked, [7, 8, 9], 0)
    (order,) = side.next_meta().lands
    assert (order.name, order.local_block_ids) == (name, ())


@pytest.mark.parametrize("keeps", [True, False])
def test_an_aborted_landing_is_abandoned_and_its_blocks_stay(
    side: SchedulerSide, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_side, "ABORTED_LOAD_KEEPS_ITS_BLOCKS", keeps)
    asked = request(ID, TO_METASERVER, 40)
    side.allocated(asked, [7, 8, 9], 40)
    side.next_meta()
    assert side.finished(asked, [7, 8, 9]) == (not keeps, None)
    assert side.next_meta().abandoned == [ID]


def test_a_failed_landing_is_not_asked_for_again(side: SchedulerSide) -> None:
    asked = request(ID, TO_METASERVER, 40)
    side.allocated(asked, [7, 8, 9], 40)
    side.next_meta()
    side.received([ID])
    assert side.num_new_matched_tokens(asked, 0) == (0, False)  # with kv_load_failure_policy recompute
    assert side.finished(asked, [7, 8, 9]) == (False, None)
    assert not side.next_meta().abandoned


@pytest.mark.parametrize(
    ("kv_role", "fault", "params"),
    [
        ("kv_producer", "", TO_METASERVER),
        ("kv_both", "this engine pulls", TO_METASERVER),
        ("kv_both", "", {**TO_METASERVER, "metaserver": "ftp://x"}),
        ("kv_both", "", {**TO_METASERVER, "metaserver": 3, "num_children": 2}),
    ],
)
def test_a_prompt_that_cannot_be_pushed_here_is_computed_here(
    link: Link, kv_role: str, fault: str, params: dict[str, Any]
) -> None:
    side = side_of(link, kv_role, fault)
    asked = request(ID, params, 40)
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    side.allocated(asked, [7, 8, 9], 0)
    assert not side.next_meta().lands
    assert side.finished(asked, [7, 8, 9]) == (False, None)


# A prefiller.


def test_a_prompt_of_one_chunk_is_leased_and_marked_in_its_step(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(), 40)
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    side.allocated(asked, [4, 5, 6], 0)
    assert side.next_meta(step(ID, 0, 40, [4, 5, 6])).marks == [MarkOrder("t1", 0, 3, (4, 5, 6))]
    assert link.client is not None
    [(request_id, num_tokens, num_blocks, target)] = link.client.pushed
    assert (request_id, num_tokens, num_blocks) == (ID, 40, 3)
    assert target == PushTarget("h", 7, "d", "l", "token", "far")
    assert not side.next_meta(step(ID, 40, 1, [])).marks  # vLLM may run ahead by a token
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    assert side.finished(asked, [4, 5, 6]) == (True, None)
    (note,) = side.next_meta().offers
    assert (note.request_id, note.leases) == (ID, (("t1", "epoch"),))
    assert not link.revoked


def test_a_prompt_of_several_chunks_is_marked_chunk_by_chunk(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(90, 6), 90)
    side.allocated(asked, [], 0)
    assert side.next_meta(step(ID, 0, 48, [1, 2, 3])).marks == [MarkOrder("t1", 0, 3, (1, 2, 3))]
    assert not side.next_meta(step("another", 0, 5, [9])).marks
    assert side.next_meta(step(ID, 48, 32, [4, 5])).marks == [MarkOrder("t1", 3, 5, (4, 5))]
    assert side.next_meta(step(ID, 80, 10, [6])).marks == [MarkOrder("t1", 5, 6, (6,))]
    assert link.client is not None and len(link.client.pushed) == 1


def test_a_block_that_two_chunks_fill_counts_with_the_second(side: SchedulerSide) -> None:
    asked = request(ID, landing(90, 6), 90)
    side.allocated(asked, [], 0)
    assert side.next_meta(step(ID, 0, 40, [1, 2, 3])).marks == [MarkOrder("t1", 0, 2, (1, 2))]
    going_on = step(ID, 48, 5, [])
    going_on.scheduled_cached_reqs.num_computed_tokens = [40]
    assert not side.next_meta(going_on).marks  # five tokens more of the same block
    going_on.scheduled_cached_reqs.num_computed_tokens = [45]
    going_on.scheduled_cached_reqs.new_block_ids = [([4, 5, 6],)]
    going_on.num_scheduled_tokens = {ID: 45}
    assert side.next_meta(going_on).marks == [MarkOrder("t1", 2, 6, (3, 4, 5, 6))]


def test_a_cached_prefix_is_not_taken_for_computed(side: SchedulerSide) -> None:
    """Another request of the same step may be about to compute it."""
    asked = request(ID, landing(), 40)
    side.allocated(asked, [], 0)
    first = step(ID, 32, 8, [4, 5, 6])
    first.scheduled_new_reqs = [SimpleNamespace(req_id=ID, block_ids=([4, 5, 6],), num_computed_tokens=32)]
    first.scheduled_cached_reqs = step(ID, 0, 8, []).scheduled_cached_reqs
    assert side.next_meta(first).marks == [MarkOrder("t1", 0, 3, (4, 5, 6))]


def test_an_aborted_push_is_revoked_and_its_blocks_stay(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(), 40)
    side.allocated(asked, [], 0)
    side.next_meta(step(ID, 0, 40, [4, 5, 6]))
    asked.status.name = "FINISHED_ABORTED"
    assert side.finished(asked, [4, 5, 6]) == (True, None)
    assert link.revoked == ["t1"]
    assert [note.leases for note in side.next_meta().offers] == [(("t1", "epoch"),)]


def test_one_that_is_aborted_before_its_lease_holds_nothing(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(90, 6), 90, "FINISHED_ABORTED")
    side.allocated(asked, [], 0)
    assert side.finished(asked, [1, 2, 3]) == (False, None)
    assert not link.revoked and not side.next_meta().offers


def test_a_preempted_push_is_taken_back_before_its_blocks_are_others(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(), 40)
    side.allocated(asked, [], 0)
    side.next_meta(step(ID, 0, 40, [4, 5, 6]))
    asked.status.name = "PREEMPTED"
    other = step("another", 0, 5, [4])
    assert not side.next_meta(other).marks
    assert link.revoked_now == ["t1"]
    side.next_meta(other)
    assert link.revoked_now == ["t1"]
    asked.status.name = "RUNNING"
    side.allocated(asked, [], 0)
    assert side.next_meta(step(ID, 16, 24, [7, 8, 9], resumed=True)).marks == [MarkOrder("t2", 0, 3, (7, 8, 9))]
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    assert side.finished(asked, [7, 8, 9]) == (True, None)
    assert [note.leases for note in side.next_meta().offers] == [(("t1", "epoch"),), (("t2", "epoch"),)]


def test_a_push_that_is_preempted_between_chunks_begins_anew(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(90, 6), 90)
    side.allocated(asked, [], 0)
    side.next_meta(step(ID, 0, 48, [1, 2, 3]))
    asked.status.name = "PREEMPTED"
    side.next_meta(step("another", 0, 5, [4]))
    assert link.revoked_now == ["t1"]
    asked.status.name = "RUNNING"
    marks = side.next_meta(step(ID, 48, 42, [9, 8, 7, 6, 5, 4], resumed=True)).marks
    assert marks == [MarkOrder("t2", 0, 6, (9, 8, 7, 6, 5, 4))]


def test_one_that_is_preempted_and_resumed_between_two_steps(side: SchedulerSide, link: Link) -> None:
    """As vLLM's reset_prefix_cache does it: nobody sees the request preempted."""
    asked = request(ID, landing(90, 6), 90)
    side.allocated(asked, [], 0)
    side.next_meta(step(ID, 0, 48, [1, 2, 3]))
    marks = side.next_meta(step(ID, 0, 90, [1, 9, 8, 7, 6, 5], resumed=True)).marks
    assert link.revoked_now == ["t1"] and marks == [MarkOrder("t2", 0, 6, (1, 9, 8, 7, 6, 5))]


def test_a_sidecar_that_is_replaced_between_chunks_is_told_all(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(90, 6), 90)
    side.allocated(asked, [], 0)
    side.next_meta(step(ID, 0, 48, [1, 2, 3]))
    link.epoch = ""  # away: nothing can be done but to wait
    assert side.next_meta(step(ID, 48, 16, [4])).marks == [MarkOrder("t1", 3, 4, (4,))]
    link.epoch = "epoch-2"
    assert side.next_meta(step(ID, 64, 26, [5, 6])).marks == [MarkOrder("t2", 4, 6, (1, 2, 3, 4, 5, 6))]
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    assert side.finished(asked, [1, 2, 3, 4, 5, 6]) == (True, None)
    assert [note.leases for note in side.next_meta().offers] == [(("t1", "epoch"),), (("t2", "epoch-2"),)]


@pytest.mark.parametrize("says", ["of the step", "of the request"])
def test_what_another_connector_loads_in_the_step_is_marked_when_the_request_has_ended(
    side: SchedulerSide, link: Link, says: str
) -> None:
    """Should that load fail, vLLM computes the blocks once more, and until then nobody may have read them."""
    asked = request(ID, landing(90, 6), 90)
    side.allocated(asked, [], 0)
    first, second = step(ID, 32, 16, [1, 2, 3]), step(ID, 48, 42, [4, 5, 6])
    first.scheduled_new_reqs = [SimpleNamespace(req_id=ID, block_ids=([1, 2, 3],), num_computed_tokens=32)]
    first.scheduled_cached_reqs = step(ID, 0, 8, []).scheduled_cached_reqs
    if says == "of the step":
        first.has_sync_kv_loads, second.has_sync_kv_loads = True, False
    else:
        asked.num_external_computed_tokens = 32
    assert not side.next_meta(first).marks and not side.next_meta(second).marks
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    assert side.finished(asked, [1, 2, 3, 4, 5, 6]) == (True, None)
    meta = side.next_meta()
    assert meta.marks == [MarkOrder("t1", 6, 6, (1, 2, 3, 4, 5, 6))]
    assert [note.leases for note in meta.offers] == [(("t1", "epoch"),)]


def test_late_marks_need_the_blocks_that_were_leased(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(90, 6), 90)
    side.allocated(asked, [], 0)
    side.next_meta(step(ID, 0, 48, [1, 2, 3]))
    loads = step(ID, 48, 42, [4, 5, 6])
    loads.has_sync_kv_loads = True
    side.next_meta(loads)
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    delayed, told = side.finished(asked, [9, 2, 3, 4, 5, 6])
    assert delayed and told is not None and link.revoked == ["t1"]
    assert not side.next_meta().marks


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (landing(41), "the decoder's prompt has 41 tokens"),
        (landing(40, 2), "--block-size"),
        ({**landing(), "baton": {**landing()["baton"], "version": 99}}, "version"),
        ({**landing(), "batch_kv_transfer_params": {"cmpl-other-0": landing()}}, NAME),
    ],
)
def test_what_does_not_fit_is_prefilled_and_not_pushed(
    side: SchedulerSide, link: Link, params: dict[str, Any], says: str
) -> None:
    asked = request(ID, params, 40)
    side.allocated(asked, [], 0)
    side.allocated(asked, [], 0)
    assert not side.next_meta(step(ID, 0, 40, [4, 5, 6])).marks
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    delayed, told = side.finished(asked, [4, 5, 6])  # neither is it held out to be pulled
    assert not delayed and told is not None and says in told["baton"]["push_failed"]
    assert link.client is not None and not link.client.pushed
    assert side.finished(asked, [4, 5, 6]) == (False, None)  # nothing is kept of it


@pytest.mark.parametrize(("kv_role", "fault"), [("kv_consumer", ""), ("kv_both", "this engine pulls")])
def test_an_engine_that_does_not_push_says_so(link: Link, kv_role: str, fault: str) -> None:
    side = side_of(link, kv_role, fault)
    asked = request(ID, landing(), 40, "FINISHED_LENGTH_CAPPED")
    side.allocated(asked, [], 0)
    delayed, told = side.finished(asked, [4, 5, 6])
    assert not delayed and told == {"baton": {"version": 1, "push_failed": fault or "kv_role is kv_consumer"}}


def test_what_the_decoder_has_already_is_not_pushed(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(landing_id=""), 40)
    side.allocated(asked, [], 0)
    assert not side.next_meta(step(ID, 0, 40, [4, 5, 6])).marks
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    assert side.finished(asked, [4, 5, 6]) == (False, None)


def test_a_sidecar_that_was_lost_has_not_pushed(side: SchedulerSide, link: Link) -> None:
    asked = request(ID, landing(), 40)
    side.allocated(asked, [], 0)
    side.next_meta(step(ID, 0, 40, [4, 5, 6]))
    link.epoch = "another"
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    delayed, told = side.finished(asked, [4, 5, 6])
    assert delayed and told is not None and told["baton"]["push_failed"] == "the sidecar was lost"


def test_each_prompt_of_a_list_goes_to_its_own_landing(side: SchedulerSide, link: Link) -> None:
    batch = {name: landing(name=name, landing_id=name) for name in ("cmpl-r-0", "cmpl-r-1")}
    params = {**batch["cmpl-r-0"], "batch_kv_transfer_params": batch}
    asked = request("cmpl-r-1-0123abcd", params, 40)
    side.allocated(asked, [], 0)
    side.next_meta(step(asked.request_id, 0, 40, [4, 5, 6]))
    assert link.client is not None and link.client.pushed[0][3].landing_id == "cmpl-r-1"


@pytest.mark.parametrize("how", ["away", "refused"])
def test_a_sidecar_that_makes_no_lease_leaves_a_plain_prefill(side: SchedulerSide, link: Link, how: str) -> None:
    assert link.client is not None
    link.client.refuses = True
    link.client = None if how == "away" else link.client
    asked = request(ID, landing(), 40)
    side.allocated(asked, [], 0)
    assert not side.next_meta(step(ID, 0, 40, [4, 5, 6])).marks
    assert not side.next_meta(step(ID, 32, 8, [])).marks  # it is not tried again
    asked.status.name = "FINISHED_LENGTH_CAPPED"
    delayed, told = side.finished(asked, [4, 5, 6])
    assert not delayed and told is not None
    assert told["baton"]["push_failed"] == ("the sidecar is away" if how == "away" else "too many leases")


def test_the_proxy_s_name_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "chatcmpl-r-0123456789abcdef"
    assert compat.external_id(request(f"{name}-0123abcd", None)) == name
    assert compat.external_id(request(name, None)) == name
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    assert compat.external_id(request("cmpl-0123abcd", None)) == "cmpl-0123abcd"
    monkeypatch.delenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION")
    monkeypatch.setattr(compat, "VERSION", (0, 13))
    assert compat.external_id(request("cmpl-0123abcd", None)) == "cmpl-0123abcd"

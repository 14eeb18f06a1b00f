"""What the scheduler's side asks of the store, promises to vLLM and gives to the store, over links that remember."""

from __future__ import annotations

from typing import Any

import pytest

from engine_adapter.vllm_connector import scheduler_store
from engine_adapter.vllm_connector.scheduler_side import SchedulerSide
from engine_adapter.vllm_connector.scheduler_store import SchedulerStore
from tests.unit.engine_adapter.vllm_connector.fake_vllm import request


class Link:
    """A SchedulerLink whose store has `has` leading blocks of whatever is asked for; None: it does not answer."""

    def __init__(self, has: int | None) -> None:
        self.has = has
        self.has_store = True
        self.client = None
        self.asked: dict[str, list[bytes]] = {}
        self.waits = 0
        self.news = self

    def clear(self) -> None:
        pass

    def wait(self, within_s: float) -> None:
        self.waits += 1

    def look_up(self, lookup_id: str, hashes: list[bytes]) -> None:
        self.asked[lookup_id] = hashes

    def found(self, lookup_id: str) -> int | None:
        return None if self.has is None else min(self.has, len(self.asked[lookup_id]))

    def forget(self, lookup_id: str) -> None:
        del self.asked[lookup_id]

    def poll(self) -> list[Any]:
        return []


def store_of(*links: Link) -> SchedulerStore:
    return SchedulerStore(links, 16, "c")  # type: ignore[arg-type]


def side_of(*links: Link) -> SchedulerSide:
    return SchedulerSide(links, "kv_both", 16, 30.0, store=store_of(*links))  # type: ignore[arg-type]


def prompt(request_id: str = "r", num_tokens: int = 40, status: str = "RUNNING", **more: Any) -> Any:
    asked = request(request_id, None, num_tokens, status)
    vars(asked).update(more)
    return asked


def test_whole_blocks_are_promised_and_loaded() -> None:
    link = Link(9)
    side, asked = side_of(link), prompt()
    side.new_request(asked)
    assert side.num_new_matched_tokens(asked, 0) == (32, True)
    assert side.num_new_matched_tokens(asked, 16) == (16, True)
    side.allocated(asked, [7, 8, 9], 16)
    (order,) = side.next_meta().store_loads
    assert order.local_block_ids == (8,) and len(order.hashes) == 1
    assert side.num_new_matched_tokens(asked, 0) == (0, False)  # asked for once, also after a failed load
    side.allocated(asked, [], 0)
    assert not side.next_meta().store_loads and not link.asked


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_the_last_token_s_block_is_always_computed(num_tokens: int, blocks: int) -> None:
    assert side_of(Link(9)).num_new_matched_tokens(prompt(num_tokens=num_tokens), 0) == (16 * blocks, blocks > 0)


def test_what_vllm_has_itself_is_not_asked_for() -> None:
    link = Link(9)
    assert side_of(link).num_new_matched_tokens(prompt(), 32) == (0, False)
    assert not link.asked


def test_vllm_asks_again_until_the_answer_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(scheduler_store.time, "monotonic", lambda: now)
    link = Link(None)
    side, asked = side_of(link), prompt()
    assert side.num_new_matched_tokens(asked, 0) == (None, False)
    assert side.num_new_matched_tokens(asked, 0) == (None, False)
    assert len(link.asked) == 1
    now += scheduler_store.LOOKUP_TIMEOUT_S
    assert side.num_new_matched_tokens(asked, 0) == (0, False)  # slow is a miss
    link.has = 1
    assert side.num_new_matched_tokens(asked, 0) == (16, True)
    now += scheduler_store.STALE_S
    link.has = None
    assert side.num_new_matched_tokens(asked, 0) == (None, False)  # an old answer is not trusted


def test_only_an_idle_step_waits_and_only_for_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(scheduler_store.time, "monotonic", lambda: now)
    link = Link(None)
    side = side_of(link)
    side.next_meta(idle=True)
    side.new_request(prompt())
    side.next_meta()
    assert link.waits == 0
    side.next_meta(idle=True)
    assert link.waits == 1
    now += scheduler_store.LOOKUP_TIMEOUT_S
    side.next_meta(idle=True)
    link.has = 2
    side.new_request(prompt("answered"))
    side.next_meta(idle=True)
    assert link.waits == 1


def test_a_store_that_is_away_has_nothing() -> None:
    link = Link(9)
    link.has_store = False
    side, asked = side_of(link), prompt()
    side.new_request(asked)
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    side.allocated(asked, [7, 8, 9], 0)
    assert side.finished(prompt(status="FINISHED_STOPPED"), [7, 8, 9]) == (False, None)
    assert not link.asked and not side.next_meta().store_saves


def test_ranks_load_what_all_of_them_have() -> None:
    assert side_of(Link(2), Link(1)).num_new_matched_tokens(prompt(), 0) == (16, True)
    assert side_of(Link(2), Link(0)).num_new_matched_tokens(prompt(), 0) == (0, False)


def test_a_lease_goes_before_the_store() -> None:
    link = Link(9)
    side = side_of(link)
    asked = request("r", {"do_remote_prefill": True})
    side.new_request(asked)
    assert side.num_new_matched_tokens(asked, 0) == (0, False)
    asked.status.name = "FINISHED_STOPPED"
    assert side.finished(asked, [1, 2, 3]) == (False, None)  # nor is it kept: a peer has computed it
    assert not link.asked


@pytest.mark.parametrize(
    "more", [{"skip_reading_prefix_cache": True}, {"prompt_embeds": object()}, {"pooling_params": object()}]
)
def test_what_must_be_computed_or_has_no_name_is(more: dict[str, Any]) -> None:
    assert side_of(Link(9)).num_new_matched_tokens(prompt(**more), 0) == (0, False)


def test_finished_blocks_are_saved_and_held() -> None:
    side = side_of(Link(0))
    asked = prompt(num_tokens=49, status="FINISHED_LENGTH_CAPPED")
    assert side.finished(asked, [4, 5, 6, 7]) == (True, None)
    (order,) = side.next_meta().store_saves
    assert order.request_id == "r" and order.block_ids == (4, 5, 6) and len(set(order.hashes)) == 3
    # What is saved is found under the same names.
    link = Link(9)
    assert store_of(link).num_new_matched_tokens(prompt(num_tokens=49), 0) == (48, True)
    assert tuple(*link.asked.values()) == order.hashes


@pytest.mark.parametrize(
    ("asked", "block_ids", "saved"),
    [
        (prompt(status="FINISHED_ABORTED"), [4, 5, 6], ()),
        (prompt(num_tokens=16, status="FINISHED_STOPPED"), [4], ()),  # its last token was not computed
        (prompt(num_computed_tokens=20, status="FINISHED_STOPPED"), [4, 5], (4,)),
        (prompt(num_computed_tokens=48, status="FINISHED_STOPPED"), [4, 5, 6], (4, 5)),  # a step ran ahead
        (prompt(num_tokens=70, status="FINISHED_STOPPED"), [4, 0, 6, 7], (4,)),
        (prompt(status="FINISHED_STOPPED"), [], ()),
        (prompt(status="FINISHED_STOPPED", prompt_embeds=object()), [4, 5], ()),
    ],
)
def test_only_what_was_computed_is_saved(asked: Any, block_ids: list[int], saved: tuple[int, ...]) -> None:
    side = side_of(Link(0))
    assert side.finished(asked, block_ids) == (bool(saved), None)
    assert [order.block_ids for order in side.next_meta().store_saves] == ([saved] if saved else [])


def test_an_aborted_load_is_stopped() -> None:
    side, asked = side_of(Link(9)), prompt(status="FINISHED_ABORTED")
    side.num_new_matched_tokens(asked, 0)
    side.allocated(asked, [7, 8, 9], 32)
    side.next_meta()
    assert side.finished(asked, [7, 8, 9]) == (False, None)
    meta = side.next_meta()
    assert meta.abandoned == ["r"] and not meta.store_saves


def test_nothing_is_kept_of_a_request_that_is_over() -> None:
    link = Link(2)
    store = store_of(link)
    for number in range(3):
        asked = prompt(f"r{number}")
        store.expect(asked)
        store.finished(asked, [1, 2], well=number == 1)
    assert not link.asked and not store._chains and not store._lookups and not store._settled


def test_new_weights_have_new_names() -> None:
    """vLLM's reset_cache: what was kept was computed with others."""
    link = Link(2)
    side, before = side_of(link), prompt("before", status="FINISHED_STOPPED")
    side.new_request(before)
    (old,) = link.asked.values()
    side.forget_stored("x")
    assert side.num_new_matched_tokens(before, 0) == (0, False)
    assert side.finished(before, [1, 2, 3]) == (False, None)  # computed with both
    side.new_request(prompt("after"))
    (new,) = link.asked.values()
    assert not set(old) & set(new)

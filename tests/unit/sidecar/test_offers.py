from __future__ import annotations

import asyncio

import pytest

from sidecar.config import SidecarConfig
from sidecar.errors import OfferRefused, Refusal
from sidecar.lease_board import BoardView, LeaseBoard, mark_of
from sidecar.leases import Claimant, State
from sidecar.message import pack_block_ids
from sidecar.metrics import SidecarMetrics
from sidecar.offers import Offers
from sidecar.protocol import (
    Computed,
    MarkReady,
    Message,
    Offer,
    OfferBlocks,
    OfferEnded,
    PushBlocks,
    PushTarget,
    Ready,
    Withdrawn,
)
from sidecar.regions import reopen_read_only

ALICE = Claimant("alice", 1)


class Desk:
    """Offers on a pool of ten blocks, and what the engine is told."""

    def __init__(self, board: LeaseBoard | None = None, **settings: float) -> None:
        self.told: list[OfferEnded] = []
        self.happened = asyncio.Event()
        config = SidecarConfig(socket="s", engine_id="e", **settings)  # type: ignore[arg-type]
        self.metrics = SidecarMetrics()
        self.offers = Offers(config, "epoch", 10, self.metrics, self._tell, 2, board)

    def _tell(self, event: OfferEnded) -> None:
        self.told.append(event)
        self.happened.set()

    def offer(self, ttl_s: float = 30.0, *block_ids: int) -> Offer:
        return self.offers.offer(OfferBlocks(7, "request", list(block_ids), 16, ttl_s))


async def test_an_offer_is_claimed_and_consumed_once() -> None:
    desk = Desk()
    offer = desk.offer(30.0, 1, 2)
    assert offer.call_id == 7 and offer.epoch == "epoch"
    lease, lasts_s = desk.offers.claim(offer.transfer_id, offer.token, ALICE)
    assert lease.block_ids == (1, 2) and 29 < lasts_s <= 30.1
    assert desk.offers.count(State.CLAIMED) == 1
    desk.offers.heartbeat(offer.transfer_id, offer.token, ALICE)
    desk.offers.release(offer.transfer_id, offer.token, ALICE, "consumed")
    assert desk.told == []  # the consumer, who waits for its answer, comes first
    await asyncio.sleep(0)
    assert desk.told == [OfferEnded(offer.transfer_id, "consumed")]
    assert b'offers_ended_total{outcome="consumed"} 1.0' in desk.metrics.page()
    desk.offers.close()


@pytest.mark.parametrize(("how", "told"), [("dropped", ["dropped"]), ("returned", []), ("eaten", [])])
async def test_releases(how: str, told: list[str]) -> None:
    desk = Desk()
    offer = desk.offer()
    desk.offers.claim(offer.transfer_id, offer.token, ALICE)
    if how == "eaten":
        with pytest.raises(Refusal, match="not 'eaten'"):
            desk.offers.release(offer.transfer_id, offer.token, ALICE, how)
    else:
        desk.offers.release(offer.transfer_id, offer.token, ALICE, how)
    await asyncio.sleep(0)
    assert [event.outcome for event in desk.told] == told
    desk.offers.close()


async def test_offers_expire_by_themselves_in_their_order() -> None:
    desk = Desk()
    late, early = desk.offer(0.05), desk.offer(0.01)
    async with asyncio.timeout(10):
        while len(desk.told) < 2:
            desk.happened.clear()
            await desk.happened.wait()
    assert desk.told == [OfferEnded(early.transfer_id, "expired"), OfferEnded(late.transfer_id, "expired")]


async def test_a_block_outside_the_pool_and_too_many_leases_are_refused() -> None:
    desk = Desk(max_leases=1)
    with pytest.raises(OfferRefused, match="block 10 is not in the pool of 10"):
        desk.offer(1.0, 9, 10)
    desk.offer(1.0, 9)
    with pytest.raises(OfferRefused, match="limit"):
        desk.offer()
    desk.offers.close()


async def test_closing_ends_all_and_leaves_no_timer() -> None:
    desk = Desk()
    ids = {desk.offer().transfer_id for _ in range(3)}
    desk.offers.close()
    assert {event.transfer_id for event in desk.told} == ids
    assert {event.outcome for event in desk.told} == {"revoked"}
    assert desk.offers._timer is None


async def test_revoking_twice_tells_once() -> None:
    desk = Desk()
    offer = desk.offer()
    desk.offers.revoke(offer.transfer_id)
    desk.offers.revoke(offer.transfer_id)
    assert desk.told == [OfferEnded(offer.transfer_id, "revoked")]


TARGET = PushTarget("h", 1, "d", "l", "t", "e")


def push(desk: Desk, ready: Ready, ttl_s: float = 30.0) -> Offer:
    return desk.offers.offer(PushBlocks(7, "request", [1, 2, 3], 48, ttl_s, ready, TARGET))


async def test_who_claimed_a_push_hears_of_every_mark_and_may_consume_when_all_is_computed() -> None:
    desk = Desk()
    offer = push(desk, Ready(0, 2, 1))
    heard: list[Message] = []
    lease, _ = desk.offers.claim(offer.transfer_id, offer.token, ALICE)
    desk.offers.follow(lease, heard.append)
    assert lease.ready == Ready(0, 2, 1)
    desk.offers.advance(MarkReady(offer.transfer_id, Ready(0, 2, 2)))
    with pytest.raises(Refusal, match="not computed yet"):
        desk.offers.release(offer.transfer_id, offer.token, ALICE, "consumed")
    desk.offers.advance(MarkReady(offer.transfer_id, Ready(2, 3, 2)))
    assert heard == [Computed(offer.transfer_id, Ready(2, 2)), Computed(offer.transfer_id, Ready(3, 3))]
    desk.offers.release(offer.transfer_id, offer.token, ALICE, "consumed")
    await asyncio.sleep(0)
    assert desk.told == [OfferEnded(offer.transfer_id, "consumed")] and len(heard) == 2
    desk.offers.advance(MarkReady(offer.transfer_id, Ready(3, 3)))  # has ended: nobody cares
    desk.offers.close()


async def test_a_push_gets_its_blocks_with_its_marks() -> None:
    desk = Desk()
    offer = desk.offers.offer(PushBlocks(7, "request", [1], 48, 30.0, Ready(), TARGET, 3))
    desk.offers.advance(MarkReady(offer.transfer_id, Ready(0, 2, 1), (2,)))
    heard: list[Message] = []
    lease, _ = desk.offers.claim(offer.transfer_id, offer.token, ALICE)
    desk.offers.follow(lease, heard.append)
    assert (lease.block_ids, lease.num_blocks) == ((1, 2), 3)
    desk.offers.advance(MarkReady(offer.transfer_id, Ready(2, 2)))
    with pytest.raises(Refusal, match="not computed yet"):  # as far as it has blocks, but not all
        desk.offers.release(offer.transfer_id, offer.token, ALICE, "consumed")
    for block_ids in ((3, 4), (10,)):  # more than the lease has, and one that is not in the pool
        with pytest.raises(Refusal):
            desk.offers.advance(MarkReady(offer.transfer_id, Ready(2, 3, 2), block_ids))
    desk.offers.advance(MarkReady(offer.transfer_id, Ready(2, 3, 2), (9,)))
    assert heard[-1] == Computed(offer.transfer_id, Ready(3, 3), (9,)) and lease.block_ids == (1, 2, 9)
    desk.offers.release(offer.transfer_id, offer.token, ALICE, "consumed")
    desk.offers.close()


@pytest.mark.parametrize("mark", [Ready(0, 1, 2), Ready(0, 4, 1), Ready(0, 3, 3), Ready(1, 0, 0), Ready(0, 2, 0)])
async def test_a_mark_that_steps_back_or_out_is_refused(mark: Ready) -> None:
    desk = Desk()
    offer = push(desk, Ready(0, 2, 1))
    with pytest.raises(Refusal):
        desk.offers.advance(MarkReady(offer.transfer_id, mark))
    plain = desk.offer(30.0, 1)
    with pytest.raises(Refusal):
        desk.offers.advance(MarkReady(plain.transfer_id, Ready(0, 1, 1)))
    with pytest.raises(OfferRefused):
        push(desk, Ready(0, 4, 1))
    desk.offers.close()


async def test_a_push_that_is_taken_back_or_runs_out_tells_who_claimed_it() -> None:
    desk = Desk(claim_ttl_s=0.1)
    for ttl_s, reason in ((30.0, "released"), (0.05, "expired")):
        offer = push(desk, Ready(), ttl_s)
        heard: list[Message] = []
        lease, _ = desk.offers.claim(offer.transfer_id, offer.token, ALICE)
        desk.offers.follow(lease, heard.append)
        desk.happened.clear()
        if reason == "released":
            desk.offers.revoke(offer.transfer_id)
        await asyncio.wait_for(desk.happened.wait(), 10)
        await asyncio.sleep(0)
        (withdrawn,) = heard
        assert isinstance(withdrawn, Withdrawn) and withdrawn.reason == reason
    offer = push(desk, Ready())
    desk.offers.unwanted(offer.transfer_id)
    assert desk.told[-1] == OfferEnded(offer.transfer_id, "dropped")
    desk.offers.unwanted(offer.transfer_id)
    desk.offers.close()


class Board:
    """A board, and a consumer that looks at it."""

    def __init__(self) -> None:
        self.board = LeaseBoard()
        self._view = BoardView(reopen_read_only(self.board.fd))

    def holds(self, offer: Offer, *block_ids: int) -> bool:
        return self._view.holds(mark_of(offer.transfer_id, offer.token, pack_block_ids(block_ids)))

    def close(self) -> None:
        self._view.close()
        self.board.close()


@pytest.mark.parametrize("ending", ["claim", "drop", "read", "revoke", "close", "expire"])
async def test_a_lease_stands_on_the_board_until_before_the_engine_hears_of_its_end(ending: str) -> None:
    seen = Board()
    desk = Desk(seen.board)
    offer = desk.offer(0.05 if ending == "expire" else 30.0, 3, 1)
    assert seen.holds(offer, 3, 1) and not seen.holds(offer, 1, 3)
    held_when_told: list[bool] = []
    tell = desk._tell
    desk.offers._on_ended = lambda event: (held_when_told.append(seen.holds(offer, 3, 1)), tell(event))[1]

    if ending == "claim":
        desk.offers.claim(offer.transfer_id, offer.token, ALICE)
        assert not seen.holds(offer, 3, 1)
        desk.offers.release(offer.transfer_id, offer.token, ALICE, "returned")
        assert not seen.holds(offer, 3, 1)
        desk.offers.revoke(offer.transfer_id)
    elif ending == "revoke":
        desk.offers.revoke(offer.transfer_id)
    elif ending == "close":
        desk.offers.close()
    elif ending != "expire":
        desk.offers.release(offer.transfer_id, offer.token, ALICE, "dropped" if ending == "drop" else "read")

    await asyncio.wait_for(desk.happened.wait(), 5)
    outcomes = {"drop": "dropped", "read": "consumed", "expire": "expired"}
    assert desk.told == [OfferEnded(offer.transfer_id, outcomes.get(ending, "revoked"))]
    assert held_when_told == [False]
    desk.offers.close()
    seen.close()


async def test_what_was_read_without_a_claim_is_refused_where_a_claim_would_be() -> None:
    desk = Desk()
    offer = desk.offer()
    desk.offers.claim(offer.transfer_id, offer.token, ALICE)
    for token, claimant, reason in (
        (offer.token, Claimant("bob", 2), "wrong_engine"),
        ("guess", ALICE, "wrong_token"),
    ):
        with pytest.raises(Refusal) as refused:
            desk.offers.release(offer.transfer_id, token, claimant, "read")
        assert refused.value.reason == reason
    await asyncio.sleep(0)
    assert desk.told == []
    desk.offers.close()


async def test_what_is_still_computed_does_not_stand_on_the_board() -> None:
    seen = Board()
    desk = Desk(seen.board)
    target = PushTarget("h", 1, "e", "l", "t", "ep")
    offer = desk.offers.offer(PushBlocks(1, "request", [1, 2], 32, 30.0, Ready(), target))
    assert not seen.holds(offer, 1, 2)
    desk.offers.close()
    seen.close()

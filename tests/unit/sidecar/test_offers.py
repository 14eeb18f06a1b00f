from __future__ import annotations

import asyncio

import pytest

from sidecar.config import SidecarConfig
from sidecar.errors import OfferRefused, Refusal
from sidecar.leases import Claimant, State
from sidecar.metrics import SidecarMetrics
from sidecar.offers import Offers
from sidecar.protocol import Offer, OfferBlocks, OfferEnded

ALICE = Claimant("alice", 1)


class Desk:
    """Offers on a pool of ten blocks, and what the engine is told."""

    def __init__(self, **settings: float) -> None:
        self.told: list[OfferEnded] = []
        self.happened = asyncio.Event()
        config = SidecarConfig(socket="s", engine_id="e", **settings)  # type: ignore[arg-type]
        self.metrics = SidecarMetrics()
        self.offers = Offers(config, "epoch", 10, self.metrics, self._tell)

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

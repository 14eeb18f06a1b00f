"""Telling consumers' sidecars, in the background, that a lease is being computed for their landings."""

from __future__ import annotations

import asyncio
import logging

from sidecar.errors import PeerLost, Refusal
from sidecar.offers import Offers
from sidecar.peers import PeerTable
from sidecar.protocol import PullSource, PushTarget
from sidecar.registration import Identity

logger = logging.getLogger(__name__)

DELAYS_S = (0.0, 0.2, 1.0)
"""When a delivery is tried; after the last the push has failed."""
UNWANTED = frozenset({"unknown", "released", "expired", "stale_epoch", "wrong_engine"})
"""What a consumer says that has given up: nobody will read the lease, and that is not the producer's fault."""


class Deliveries:
    """The deliveries of one registration. A push that cannot be delivered ends as dropped or revoked."""

    def __init__(self, identity: Identity, epoch: str, peers: PeerTable, offers: Offers) -> None:
        self._identity = identity
        self._epoch = epoch
        self._peers = peers
        self._offers = offers
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, target: PushTarget, transfer_id: str, token: str, num_blocks: int) -> None:
        """Tell `target`; the rest is claims and releases, as with any offer."""
        identity = self._identity
        source = PullSource(
            identity.host, identity.port, identity.engine_id, transfer_id, token, self._epoch, num_blocks
        )
        task = asyncio.ensure_future(self._deliver(target, source))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Deliver nothing more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self, target: PushTarget, source: PullSource) -> None:
        failure = Refusal("unreachable", "")
        for delay_s in DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                await self._peers.deliver(target, source)
                return
            except PeerLost as lost:
                failure = lost
            except Refusal as refusal:
                failure = refusal
                break
        peer = f"{target.engine_id}@{target.host}:{target.port}"
        logger.warning(
            "delivery_failed transfer_id=%s peer=%s reason=%s message=%s",
            source.transfer_id, peer, failure.reason, failure.message,
        )  # fmt: skip
        if failure.reason in UNWANTED:
            self._offers.unwanted(source.transfer_id)
        else:
            self._offers.revoke(source.transfer_id)

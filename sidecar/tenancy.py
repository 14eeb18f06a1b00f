"""One engine's stay: the pool it registered and everything that lives only as long as that."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from sidecar.deliveries import Deliveries
from sidecar.landings import Landings
from sidecar.offers import Offers
from sidecar.peer_session import PeerSession
from sidecar.peers import PeerTable
from sidecar.registration import Registration
from sidecar.store.store_table import StoreTable
from sidecar.transfer_table import TransferTable
from sidecar.transport.contract import Transport

logger = logging.getLogger(__name__)


class Joined(Protocol):
    """A connection of another process of the same engine."""

    def close(self, why: str) -> None:
        """End it."""


class Tenancy:
    """Made when a pool is registered; `retire` takes it apart in the order that keeps every promise."""

    def __init__(
        self,
        registration: Registration,
        offers: Offers,
        peers: PeerTable,
        pulls: TransferTable,
        landings: Landings,
        deliveries: Deliveries,
        transports: Iterable[Transport],
        store: StoreTable | None = None,
    ) -> None:
        self.registration = registration
        self.offers = offers
        self.peers = peers
        self.pulls = pulls
        self.store = store
        self.landings = landings
        self.deliveries = deliveries
        self.peer_sessions: set[PeerSession] = set()
        self.joined: set[Joined] = set()
        self._transports = tuple(transports)

    async def retire(self, why: str) -> None:
        """Void every lease, cut readers off, end every pull, and unmap once nothing writes any more."""
        self.registration.retired = True
        for session in list(self.peer_sessions):
            session.close(why)
        for joined in list(self.joined):
            joined.close(why)
        self.landings.close(why)
        await self.deliveries.close()
        self.offers.close()
        await self.pulls.close(why)
        if self.store is not None:
            await self.store.close(why)
        await self.peers.close()
        for transport in self._transports:
            await transport.retire(self.registration)
        self.registration.close()
        logger.info("pool_retired epoch=%s reason=%s", self.registration.epoch, why)

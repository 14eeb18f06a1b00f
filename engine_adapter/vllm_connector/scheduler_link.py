"""The scheduler's tie to one rank's sidecar."""

from __future__ import annotations

import contextlib
import threading

from engine_adapter.sidecar_link import SidecarLink
from engine_adapter.vllm_connector.staged_offers import StagedOffers
from sidecar.client import SidecarClient
from sidecar.errors import SidecarError
from sidecar.protocol import Event, StoreFound, StoreLookup

ANSWER_WITHIN_S = 2.0


class SchedulerLink(SidecarLink):
    """Joins the pool that the worker registered. Nobody polls it on an idle engine, so it polls itself."""

    def __init__(self, socket_path: str, staged: StagedOffers | None = None) -> None:
        super().__init__(socket_path, self._join, self.poll)
        self._staged = staged
        self._polling = threading.Lock()
        self.news = threading.Event()
        """Set when a lookup is answered."""
        self._found: dict[str, int | None] = {}

    def _join(self, client: SidecarClient) -> str:
        epoch = client.join_pool()
        if self._staged is not None:
            self._staged.buffer_is(client.staged_slots)
        return epoch

    def revoke_now(self, transfer_id: str) -> None:
        """As `revoke`, and the sidecar has done it when this returns: no reader's confirmation counts any more."""
        self.revoke(transfer_id)
        if (client := self.client) is not None:
            with contextlib.suppress(SidecarError):
                client.join_pool()  # answered in turn, after the revocation

    @property
    def has_store(self) -> bool:
        """Whether the sidecar is there and keeps blocks."""
        return bool((client := self.client) is not None and client.hello.store)

    def look_up(self, lookup_id: str, hashes: list[bytes]) -> None:
        """Ask how many of these blocks the store has; see `found`."""
        self._found[lookup_id] = None
        self.ask_store(StoreLookup(lookup_id, hashes), ANSWER_WITHIN_S)

    def found(self, lookup_id: str) -> int | None:
        """How many leading blocks; None as long as that is not known."""
        return self._found.get(lookup_id)

    def forget(self, lookup_id: str) -> None:
        """Its answer is of no interest any more."""
        self._found.pop(lookup_id, None)

    def poll(self) -> list[Event]:
        """Also on the link's own threads."""
        with self._polling:
            events = super().poll()
            for event in events:
                if isinstance(event, StoreFound) and event.lookup_id in self._found:
                    self._found[event.lookup_id] = event.num_blocks
                    self.news.set()
        return events

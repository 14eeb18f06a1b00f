"""What a transport is, and which one two sidecars use."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sidecar.protocol import RegionOpened
from sidecar.registration import Registration
from sidecar.spans import Spans

COPIED = ""
STOPPED = "stopped"
VOID = "void"
"""All came, or nothing, but the lease that the read named was not valid all the time."""


class PendingCopy:
    """A copy under way. `ended` resolves to COPIED, STOPPED, VOID or what went wrong, when nothing writes any more."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """Write no more than what is on its way; `ended` follows. A copy that is done stays done."""
        raise NotImplementedError

    def _finish(self, outcome: str) -> None:
        if not self.ended.done():
            self.ended.set_result(outcome)


class PeerMemory(Protocol):
    """One producer's pool as this consumer reads it."""

    transport: str
    checks_marks: bool
    """Whether a read may name a lease by its mark (see lease_board), which the producer then checks."""

    @property
    def broken(self) -> str:
        """Why no further read can work; "" if it can."""
        ...

    def read(self, spans: Spans, mark: int = 0) -> PendingCopy:
        """Begin copying bounds-checked spans. Raises Refusal("transport") if it is broken.

        With a `mark` the copy ends in VOID unless that stood on the producer's board before the first byte was read
        from its pool and after the last.
        """
        ...

    async def close(self) -> None:
        """Cut the peer off: when this returns, nothing of it writes here and every PendingCopy has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """How the pool is offered to one peer; `fd` is to be sent and closed."""

    session: str = ""
    base_address: int = 0
    fd: int | None = None


class Transport(Protocol):
    """One per sidecar and kind."""

    name: str
    needs_same_host: bool

    def registered(self, registration: Registration) -> None:
        """A pool is there: a transport that takes time to serve it may begin now."""
        ...

    async def serve(self, registration: Registration) -> Served:
        """Offer our pool to a peer. Raises Refusal("transport")."""
        ...

    async def open(self, registration: Registration, opened: RegionOpened, fd: int | None) -> PeerMemory:
        """Reach a producer's pool; `fd` is taken over. Raises Refusal("transport"|"unreachable")."""
        ...

    async def retire(self, registration: Registration) -> None:
        """The pool goes away: stop serving it."""
        ...

    def fault(self) -> str:
        """Why the transport is broken now; "" if it is not."""
        ...


def common(ours: Sequence[str], theirs: Sequence[str], *, same_host: bool) -> list[str]:
    """Transports that both allow, best first: shared memory where the host is one, then the rest in our order."""
    return [name for name in ours if name in theirs and (same_host or name != "shm")]

"""What an answer is written to, and what it is relayed from: a client's connection, or what stands in for one."""

from __future__ import annotations

import asyncio
from typing import Protocol

from proxy.errors import Failure


class Relayed(Protocol):
    """The source of a stream: slowed down at the reader's pace, ended when the reader leaves."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def stop_relay(self) -> None: ...

    def end_relay(self, failure: Failure) -> None:
        """The reader is still there, and the answer is to end here."""
        ...


class Downstream(Protocol):
    """Whoever waits for one answer: the frontend's connection, or one request divided into children."""

    @property
    def transport(self) -> asyncio.WriteTransport: ...

    def write(self, data: bytes) -> None: ...

    def lendable(self) -> int | None:
        """A descriptor to which others may write while nobody calls `write`; None where there is none, or where some of
        what was written still waits."""
        ...

    def relay_from(self, upstream: Relayed | None) -> None: ...

    def end_relay(self, failure: Failure) -> bool:
        """End the stream that is relayed, as if its instance had failed so. False if none is."""
        ...

    def answered(self, *, close: bool) -> None:
        """The answer was written in full."""
        ...

    def break_off(self) -> None:
        """The answer cannot be finished."""
        ...

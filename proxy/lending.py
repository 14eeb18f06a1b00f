"""What is agreed on when a stream is lent to the relay thread, and what comes back of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Terms(NamedTuple):
    """How the stream's token events end, by which bytes as many others are to be replaced, and what may be kept."""

    tail: bytes
    old_id: bytes
    new_id: bytes
    room_bytes: int


class Kept(Protocol):
    """Whole token events, not copied before somebody needs them."""

    @property
    def num_bytes(self) -> int: ...

    def copied(self) -> bytes: ...


class Returned(NamedTuple):
    num_chunks: int
    """Passed on."""
    kept: Kept | None
    """What was passed on, as it came; None if it was more than there was room for."""
    unsent: bytes
    """To be sent before anything else: the client did not take it yet."""
    rest: bytes
    """What came and was not passed on. It begins where a chunk begins."""

"""One landing on the consumer's side: which step may follow which. Pure; landings tells the story.

Blocks wait to be filled by a producer that comes by itself. Producers may fail and others come: a landing is filled by
one at a time, and its end is reported once, when nothing writes any more.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    WAITING = "waiting"
    FILLING = "filling"
    ENDED = "ended"


class Happening(StrEnum):
    DELIVERED = "delivered"  # a producer has come
    PULL_FAILED = "pull_failed"  # and was lost, with nothing writing any more
    PULL_ENDED = "pull_ended"  # all is here, or the landing had to end while a pull ran
    GIVEN_UP = "given_up"  # abandoned, out of time or engine lost, while nobody wrote


TRANSITIONS: dict[tuple[State, Happening], State] = {
    (State.WAITING, Happening.DELIVERED): State.FILLING,
    (State.WAITING, Happening.GIVEN_UP): State.ENDED,
    (State.FILLING, Happening.DELIVERED): State.FILLING,  # the latest takes over
    (State.FILLING, Happening.PULL_FAILED): State.WAITING,
    (State.FILLING, Happening.PULL_ENDED): State.ENDED,
}
"""What may happen; anything else is refused where a peer asked for it, and a fault of this program elsewhere."""

"""One pull on the consumer's side: which step may follow which. Pure; transfer_table tells the story.

Nothing is reported before ENDED, and a pull whose copy began reaches ENDED only through a stop or the copy's end:
the engine may use its blocks again as soon as it hears.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    CONNECTING = "connecting"
    CLAIMING = "claiming"
    COPYING = "copying"
    FOLLOWING = "following"  # all that is computed is copied: nothing writes until there is more
    STOPPING = "stopping"
    RELEASING = "releasing"
    READING = "reading"  # copying what is not claimed: worth something only if the board shows it valid afterwards
    ENDED = "ended"


class Happening(StrEnum):
    CONNECTED = "connected"
    PEER_STALE = "peer_stale"  # a pooled connection turned out dead before the claim's answer: connect once more
    BEGUN = "begun"  # the copy, as the board shows the lease
    VOID = "void"  # the board no longer does: all begins anew, with a claim
    CLAIMED = "claimed"
    PART_COPIED = "part_copied"  # nothing at the very first
    MORE_READY = "more_ready"
    COPIED = "copied"
    STOPPED = "stopped"
    CONFIRMED = "confirmed"
    FAILED = "failed"  # refused, unreachable, or the copy ended in an error (and has stopped)
    INTERRUPTED = "interrupted"  # abandoned, out of time, peer or engine lost, lease lost


TRANSITIONS: dict[tuple[State, Happening], State] = {
    (State.CONNECTING, Happening.CONNECTED): State.CLAIMING,
    (State.CONNECTING, Happening.BEGUN): State.READING,
    (State.READING, Happening.COPIED): State.RELEASING,
    (State.READING, Happening.VOID): State.CONNECTING,
    (State.READING, Happening.FAILED): State.ENDED,
    (State.READING, Happening.INTERRUPTED): State.STOPPING,
    (State.CONNECTING, Happening.FAILED): State.ENDED,
    (State.CONNECTING, Happening.INTERRUPTED): State.ENDED,
    (State.CLAIMING, Happening.CLAIMED): State.COPYING,
    (State.CLAIMING, Happening.PEER_STALE): State.CONNECTING,
    (State.CLAIMING, Happening.FAILED): State.ENDED,
    (State.CLAIMING, Happening.INTERRUPTED): State.ENDED,
    (State.COPYING, Happening.PART_COPIED): State.FOLLOWING,
    (State.FOLLOWING, Happening.MORE_READY): State.COPYING,
    (State.FOLLOWING, Happening.COPIED): State.RELEASING,
    (State.FOLLOWING, Happening.FAILED): State.ENDED,
    (State.COPYING, Happening.COPIED): State.RELEASING,
    (State.COPYING, Happening.FAILED): State.ENDED,
    (State.COPYING, Happening.INTERRUPTED): State.STOPPING,
    (State.STOPPING, Happening.STOPPED): State.ENDED,
    (State.RELEASING, Happening.CONFIRMED): State.ENDED,
    (State.RELEASING, Happening.FAILED): State.ENDED,
    (State.RELEASING, Happening.INTERRUPTED): State.ENDED,
}
"""What may happen; anything else is a fault of this program and raises IllegalTransition."""


class IllegalTransition(Exception):
    """A step that the table does not have."""


class Progress:
    """Where one pull stands."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State.CONNECTING

    def step(self, happening: Happening) -> State:
        """Take one step and return the state it leads to. Raises IllegalTransition."""
        state = TRANSITIONS.get((self.state, happening))
        if state is None:
            raise IllegalTransition(f"{happening} while {self.state}")
        self.state = state
        return state

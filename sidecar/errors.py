"""Everything that can go wrong, by whose fault it is.

`SidecarError` and its children are what an engine sees through `sidecar.client`; `Refusal` is how a peer or a table
says no, with a reason from REASONS; `StartError` and `UsageError` are for the operator.
"""

from __future__ import annotations

REASONS = (
    "expired",  # the lease's time had run out, or ran out before the copy was confirmed
    "unknown",  # no such transfer
    "released",  # already consumed, dropped or taken back
    "wrong_token",
    "wrong_engine",  # not the producer named, or claimed by another consumer
    "stale_epoch",  # the producer's engine or sidecar restarted since the offer
    "incompatible",  # protocol version, layout or transports do not match; the message names the field
    "unreachable",  # the peer refuses connections or its connection broke
    "timeout",  # the pull's deadline passed
    "transport",  # moving bytes failed
    "abandoned",  # nobody wanted it any more
    "invalid",  # the pull itself makes no sense: block ids outside the pool, more blocks than the lease has
    "sidecar_lost",  # said by the client: the sidecar's connection ended
)
"""Why a pull failed; the empty string stands for success."""


class SidecarError(Exception):
    """The base of what `sidecar.client` raises."""


class SidecarUnavailable(SidecarError):
    """No sidecar answers at the socket, or its connection has ended; connect a new client."""


class VersionMismatch(SidecarUnavailable):
    """The sidecar speaks another version of the protocol."""


class LayoutRefused(SidecarError):
    """The pool or its layout cannot be registered; the message names the field."""


class OfferRefused(SidecarError):
    """The offer was not taken: bad block ids, too many leases, or no pool registered."""


class FrameError(Exception):
    """The other end broke the framing or the message types; its connection is closed."""


class Refusal(Exception):
    """A request that is refused, with one of REASONS and a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class PeerLost(Refusal):
    """The connection to a peer ended, or never came about."""

    def __init__(self, message: str) -> None:
        super().__init__("unreachable", message)


class StartError(Exception):
    """The sidecar cannot start; the message says what to do. Exit status 1."""


class UsageError(Exception):
    """A flag or value on the command line is wrong. Exit status 2."""

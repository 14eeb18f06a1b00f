"""As many file descriptors as the system lets the process have."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

OWN = 2  # of a connection: the client's, and one to an instance
PER_CONNECTION = 2 * OWN  # each once more while the relay thread has the stream


def raise_descriptor_limit(max_connections: int, num_more: int = 0) -> int:
    """Raise the soft limit to what is needed, as far as the hard one allows, and say so where that is not enough.
    Returns how many streams the relay thread may have: no connection is to fail for want of what it took."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = PER_CONNECTION * max_connections + 256 + num_more
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return max_connections
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    if raised < needed:
        log.warning(
            "event=few_descriptors limit=%d needed=%d max_connections=%d: raise ulimit -n or lower --max-connections",
            raised, needed, max_connections,
        )  # fmt: skip
    return max(0, max_connections - (needed - raised + OWN - 1) // OWN)

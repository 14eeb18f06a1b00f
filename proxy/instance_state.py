"""Where an instance is in its life. Pure.

| state | new work | what it becomes |
|---|---|---|
| waiting | no | active once it answers; gone when it is removed, or when its probes are spent |
| active | yes | draining when it is removed, when its lease ends, when its role changes |
| draining | no | serving_kv once nothing is open on it; active when it is added again; gone at the deadline |
| serving_kv | no | gone once no decoder can come for its KV any more; active when added again; gone at the deadline |
| gone | no | waiting when it is added again |

A prefiller without work still has to serve the reads of the KV it handed out, so "no new work" and "done" are two
states (users-ask.md, 12). Waiting instances are no members yet: `membership.py` keeps them.
"""

from __future__ import annotations

import enum


class InstanceState(enum.StrEnum):
    WAITING = "waiting"
    ACTIVE = "active"
    DRAINING = "draining"
    SERVING_KV = "serving_kv"
    GONE = "gone"


def state_of(*, enabled: bool, num_open: int, num_kv_held: int, overdue: bool) -> InstanceState:
    """The state of a member, by what is open on it, the KV of it that nobody has fetched, and its drain's deadline."""
    if enabled:
        return InstanceState.ACTIVE
    if overdue:
        return InstanceState.GONE
    if num_open:
        return InstanceState.DRAINING
    return InstanceState.SERVING_KV if num_kv_held else InstanceState.GONE

"""`GET /instances` of all workers as one: what is open is added up, what is seen is told once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]

# An instance is a member when it is one in every worker, and gone when it is gone in every worker.
_STATES = ("active", "draining", "serving_kv", "gone")


def joined(shows: Sequence[Json]) -> Json:
    """`shows[0]` is the answering worker's own; what is not listed here is as it says."""
    whole = dict(shows[0])
    whole["waiting"] = _by_address((show["waiting"] for show in shows), lambda same: same[0])
    waiting = {(one["role"], one["address"]) for one in whole["waiting"]}
    members = _by_address((show["instances"] for show in shows), _instance)
    whole["instances"] = [one for one in members if (one["role"], one["address"]) not in waiting]
    for key in ("num_in_flight", "num_queued", "num_reservations", "kv_ledger", "num_reclaims_open"):
        whole[key] = _sum([show[key] for show in shows])
    return whole


def _by_address(lists: Iterable[list[Json]], join: Any) -> list[Json]:
    same: dict[tuple[str, str], list[Json]] = {}
    for one in (one for some in lists for one in some):
        same.setdefault((one["role"], one["address"]), []).append(one)
    return [join(seen) for seen in same.values()]


def _instance(seen: list[Json]) -> Json:
    one = dict(seen[0])
    one["state"] = min((other["state"] for other in seen), key=_rank)
    one["enabled"] = any(other["enabled"] for other in seen)
    one["healthy"] = all(other["healthy"] for other in seen)
    one["num_failures"] = max(other["num_failures"] for other in seen)
    one["last_error"] = next((other["last_error"] for other in seen if not other["healthy"]), one["last_error"])
    one["becoming"] = next((other["becoming"] for other in seen if other["becoming"]), None)
    one["kv_held"] = sum(other["kv_held"] for other in seen)
    one["connections"] = _sum([other["connections"] for other in seen])
    loads = [other["load"] for other in seen]
    one["load"] = {
        **loads[0],
        **{key: sum(load[key] for load in loads) for key in ("num_requests", "num_tokens", "kv_tokens")},
        "total_requests": sum(load["total_requests"] for load in loads),
        "speed_tokens_per_s": round(sum(load["speed_tokens_per_s"] for load in loads) / len(loads), 1),
    }
    return one


def _rank(state: str) -> int:
    return _STATES.index(state) if state in _STATES else len(_STATES)


def _sum(values: Sequence[Any]) -> Any:
    """Of numbers, or of objects of numbers key by key."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _sum([value[key] for value in values if key in value]) for key in keys}
    return sum(values)

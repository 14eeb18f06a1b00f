from __future__ import annotations

from typing import Any

from proxy.workers.instances_sum import joined


def instance(address: str, state: str = "active", *, healthy: bool = True, num: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "role": "decode", "address": address, "state": state, "enabled": state == "active", "healthy": healthy,
        "num_failures": 0 if healthy else 2, "last_error": "" if healthy else "refused", "becoming": None,
        "kv_held": num, "connections": {"active": num, "idle": 2},
        "load": {
            "num_requests": num, "num_tokens": 10 * num, "kv_tokens": 5 * num, "max_kv_tokens": 100,
            "max_streams": None, "total_requests": num, "speed_tokens_per_s": 100.0 * num,
        },
        **more,
    }  # fmt: skip


def show(*instances: dict[str, Any], waiting: tuple[str, ...] = (), num: int = 1) -> dict[str, Any]:
    return {
        "instances": list(instances),
        "waiting": [{"role": "decode", "address": address, "num_probes": 1} for address in waiting],
        "contract": {"name": "pull"},
        "num_in_flight": num, "num_queued": num, "num_reservations": num, "num_reclaims_open": 0,
        "kv_ledger": {"num_entries": num, "totals": {"held": num}},
    }  # fmt: skip


def test_what_is_open_is_added_up_and_what_is_seen_is_told_once() -> None:
    whole = joined([show(instance("h:1", num=1)), show(instance("h:1", healthy=False, num=2), num=4)])
    (one,) = whole["instances"]
    assert one["load"] == {
        "num_requests": 3, "num_tokens": 30, "kv_tokens": 15, "max_kv_tokens": 100, "max_streams": None,
        "total_requests": 3, "speed_tokens_per_s": 150.0,
    }  # fmt: skip
    assert (one["healthy"], one["last_error"], one["num_failures"]) == (False, "refused", 2)
    assert (one["connections"], one["kv_held"]) == ({"active": 3, "idle": 4}, 3)
    assert (whole["num_in_flight"], whole["num_queued"], whole["contract"]) == (5, 5, {"name": "pull"})
    assert whole["kv_ledger"] == {"num_entries": 5, "totals": {"held": 5}}


def test_an_instance_is_gone_when_it_is_gone_everywhere_and_there_when_all_have_it() -> None:
    whole = joined([show(instance("a:1", "serving_kv")), show(instance("a:1", "draining"))])
    assert whole["instances"][0]["state"] == "draining"
    assert joined([show(instance("a:1", "draining")), show()])["instances"][0]["state"] == "draining"
    whole = joined([show(instance("a:1")), show(waiting=("a:1",))])
    assert whole["instances"] == [] and [one["address"] for one in whole["waiting"]] == ["a:1"]


def test_of_one_worker_it_is_the_same() -> None:
    alone = show(instance("h:1"), waiting=("h:2",))
    assert joined([alone]) == alone

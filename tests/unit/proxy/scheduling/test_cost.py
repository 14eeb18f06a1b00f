from __future__ import annotations

import json

import orjson
import pytest

from proxy.load_ledger import InstanceLoad
from proxy.openai_api import INT64_MAX, parse_call
from proxy.scheduling.cost import DECODE_STEP_TOKENS, cost_of, step_tokens


def test_costs_grow_with_what_is_asked() -> None:
    def cost(**fields: object):  # type: ignore[no-untyped-def]
        return cost_of(parse_call("completions", orjson.dumps({"prompt": [1] * 100, **fields})))

    assert cost().prefill_tokens == 100 + 64
    assert cost(max_tokens=16).decode_tokens < cost().decode_tokens < cost(max_tokens=900).decode_tokens
    assert cost(max_tokens=10**9) == cost(max_tokens=1024)
    assert cost(n=4).decode_tokens > 3 * cost().decode_tokens - 300


@pytest.mark.parametrize("n", [10**6, INT64_MAX, 2**70])
def test_a_clients_n_is_not_believed_beyond_reason(n: int) -> None:
    """The load board has 64 bits for all that is open together."""
    cost = cost_of(parse_call("completions", json.dumps({"prompt": ["a"] * 1000, "n": n, "max_tokens": n}).encode()))
    assert max(cost) < 1 << 24


def test_a_step_costs_what_was_open_on_average() -> None:
    load = InstanceLoad()
    load.reserve(1000)
    reservation = load.reserve(500)
    load.reserve(2000)
    assert step_tokens(load, reservation) == DECODE_STEP_TOKENS + (1500 + 3500) / 2

from __future__ import annotations

from itertools import product

import pytest

from proxy.instance_state import InstanceState, state_of

ACTIVE, DRAINING, SERVING_KV, GONE = (
    InstanceState.ACTIVE, InstanceState.DRAINING, InstanceState.SERVING_KV, InstanceState.GONE,
)  # fmt: skip
# (enabled, something open, KV held, past the deadline): every case there is
STATES = {
    (True, False, False, False): ACTIVE,
    (True, True, False, False): ACTIVE,
    (True, False, True, False): ACTIVE,
    (True, True, True, False): ACTIVE,
    (True, False, False, True): ACTIVE,
    (True, True, False, True): ACTIVE,
    (True, False, True, True): ACTIVE,
    (True, True, True, True): ACTIVE,
    (False, True, False, False): DRAINING,
    (False, True, True, False): DRAINING,
    (False, False, True, False): SERVING_KV,
    (False, False, False, False): GONE,
    (False, True, False, True): GONE,
    (False, True, True, True): GONE,
    (False, False, True, True): GONE,
    (False, False, False, True): GONE,
}


@pytest.mark.parametrize("bits", list(product((True, False), repeat=4)))
def test_every_case_has_its_state(bits: tuple[bool, bool, bool, bool]) -> None:
    enabled, num_open, num_kv_held, overdue = bits
    found = state_of(enabled=enabled, num_open=3 * num_open, num_kv_held=2 * num_kv_held, overdue=overdue)
    assert found is STATES[bits]

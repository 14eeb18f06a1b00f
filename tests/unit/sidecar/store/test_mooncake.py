"""Mooncake Store as it fails: everything is a miss in bounded time, and nothing wrong is ever read."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from sidecar.store import mooncake
from sidecar.store.mooncake import MooncakeSettings, MooncakeTier
from sidecar.store.mooncake_process import Put
from sidecar.store.sealed_block import header_of
from tests.unit.sidecar.store.conftest import NEEDS_MOONCAKE, Master, Observer, free_port
from tests.unit.sidecar.store.test_tiers import BLOCK_BYTES, block_of, key_of

pytestmark = NEEDS_MOONCAKE


@pytest.fixture
def alone(observer: Observer) -> Iterator[tuple[MooncakeTier, Master]]:
    """A tier with a master of its own, to be broken."""
    master = Master()
    tier = MooncakeTier(MooncakeSettings("127.0.0.1", master.address, 64 << 20), observer)
    assert tier.put(key_of("kept"), block_of("kept"))
    yield tier, master
    master.kill()
    tier._kill()
    tier.close()


def test_the_masters_death_is_misses_and_not_for_long(alone: tuple[MooncakeTier, Master], observer: Observer) -> None:
    tier, master = alone
    master.kill()
    started_at = time.monotonic()
    assert tier.get(key_of("never put"), BLOCK_BYTES) is None
    assert not tier.put(key_of("new"), block_of("new"))
    assert tier.has([key_of("kept")], until_missing=True) in ([False], [True])
    assert time.monotonic() - started_at < 3 * mooncake.CALL_TIMEOUT_S
    started_at = time.monotonic()
    for _ in range(100):
        assert tier.get(key_of("never put"), BLOCK_BYTES) is None
    assert time.monotonic() - started_at < 2 * mooncake.CALL_TIMEOUT_S, "a tier that is away is not asked each time"
    assert tier.fault()


def test_a_client_that_hangs_is_killed(alone: tuple[MooncakeTier, Master], observer: Observer) -> None:
    tier, _ = alone
    process = tier._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    started_at = time.monotonic()
    assert tier.get(key_of("kept"), BLOCK_BYTES) is None
    assert time.monotonic() - started_at < 2 * mooncake.CALL_TIMEOUT_S
    assert process.poll() is not None
    assert observer.errors["away"] == 1
    assert "no answer" in tier.fault()


def test_data_that_was_reclaimed_under_a_read_is_a_miss(alone: tuple[MooncakeTier, Master], observer: Observer) -> None:
    """What a lease that ran out would show: a whole value that is another block's."""
    tier, _ = alone
    asked, other = key_of("asked"), key_of("other")
    value = header_of(other, block_of("other")) + block_of("other")
    assert tier._call(Put(mooncake._name(asked), bytes(value))) == 0
    assert tier.get(asked, BLOCK_BYTES) is None
    cut = header_of(key_of("cut"), block_of("cut")) + block_of("cut")[:100]
    assert tier._call(Put(mooncake._name(key_of("cut")), bytes(cut))) == 0
    assert tier.get(key_of("cut"), BLOCK_BYTES) is None
    assert observer.errors == {"mismatch": 1, "torn": 1}


def test_a_master_that_is_not_there_costs_one_try(observer: Observer) -> None:
    tier = MooncakeTier(MooncakeSettings("127.0.0.1", f"127.0.0.1:{free_port()}", 16 << 20), observer)
    started_at = time.monotonic()
    assert tier.get(key_of("x"), BLOCK_BYTES) is None
    assert time.monotonic() - started_at < mooncake.START_TIMEOUT_S + 2
    assert tier.get(key_of("x"), BLOCK_BYTES) is None
    assert observer.errors["away"] == 1
    assert tier.fault()
    tier.close()

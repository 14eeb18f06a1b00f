"""The engine's KV transfer and its own sidecar, over real pd-sidecar processes and pools of random bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.sidecar_link import FENCE_GRACE_S
from engine_adapter.sidecar_process import OwnSidecar, SidecarCommand, SidecarStartError
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransferUnavailable
from engine_adapter.torch_engine.prefix_store import LoadResult, StoreEvents
from engine_adapter.torch_engine.sequence import EngineRequestError
from engine_adapter.torch_engine.sidecar_kv_transfer import SidecarKvTransfer
from sidecar.protocol import KvLayout, Plane

BLOCK_BYTES, NUM_BLOCKS = 4096, 32
PULL_TIMEOUT_S = 1.0
LAYOUT = KvLayout(
    num_blocks=NUM_BLOCKS,
    block_size=16,
    planes=(Plane(0, BLOCK_BYTES, BLOCK_BYTES),),
    num_layers=1,
    num_kv_heads=2,
    head_dim=16,
    dtype="float32",
    model="test",
    order="block,layer,kv,token,head",
)


class Side:
    """An engine without a model: a pool, a sidecar of its own, and the KV transfer between them."""

    def __init__(self, name: str, lease_s: float = 30.0, more: tuple[str, ...] = ()) -> None:
        self.sidecar = OwnSidecar(SidecarCommand(engine_id=name, transport="shm", log_level="WARNING", more=more))
        self.sidecar.start()
        self.fd = os.memfd_create(name)
        os.ftruncate(self.fd, LAYOUT.pool_bytes)
        os.pwrite(self.fd, random.Random(name).randbytes(LAYOUT.pool_bytes), 0)
        self.transfer = SidecarKvTransfer(
            self.sidecar.socket_path, lambda client: client.register_pool(self.fd, LAYOUT), LAYOUT, lease_s=lease_s,
            pull_timeout_s=PULL_TIMEOUT_S, wake=lambda: None, store_load_timeout_s=PULL_TIMEOUT_S,
        )  # fmt: skip
        self.transfer.start()

    def block(self, block_id: int) -> bytes:
        return os.pread(self.fd, BLOCK_BYTES, block_id * BLOCK_BYTES)

    def until(self, seen: Callable[[KvEvents], bool], within_s: float = 10.0) -> KvEvents:
        """Poll until an event passes `seen`; every event is asked once, as the engine would."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            events = self.transfer.poll()
            if seen(events):
                return events
            time.sleep(0.005)
        raise AssertionError("nothing of the kind happened")

    def until_available(self, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not self.transfer.available:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill_sidecar(self) -> None:
        assert self.sidecar.pid is not None
        os.kill(self.sidecar.pid, signal.SIGKILL)

    def close(self) -> None:
        self.transfer.close()
        self.sidecar.stop()
        os.close(self.fd)


@pytest.fixture
def producer() -> Iterator[Side]:
    side = Side("producer")
    yield side
    side.close()


@pytest.fixture
def consumer() -> Iterator[Side]:
    side = Side("consumer")
    yield side
    side.close()


def ended(request_id: str) -> Callable[[KvEvents], bool]:
    return lambda events: request_id in events.ended_offers


def pulled(request_id: str) -> Callable[[KvEvents], bool]:
    return lambda events: any(pull.request_id == request_id for pull in events.pulls)


def test_offered_blocks_are_pulled_and_both_sides_hear_of_it(producer: Side, consumer: Side) -> None:
    params = producer.transfer.offer("r1", [3, 4, 9], 40, 0)
    consumer.transfer.check(params)
    consumer.transfer.start_pull("d1", params, [7, 2], 1)
    (pull,) = consumer.until(pulled("d1")).pulls
    assert (pull.ok, pull.num_blocks, pull.num_bytes, pull.transport) == (True, 2, 2 * BLOCK_BYTES, "shm")
    assert pull.peer.startswith("producer@127.0.0.1:")
    assert [consumer.block(7), consumer.block(2)] == [producer.block(4), producer.block(9)]
    assert producer.until(ended("r1")).ended_offers == ["r1"]


def test_a_dropped_and_a_revoked_offer_end(producer: Side, consumer: Side) -> None:
    params = producer.transfer.offer("dropped", [1], 16, 0)
    consumer.transfer.drop(params)
    producer.until(ended("dropped"))
    producer.transfer.offer("revoked", [1], 16, 0)
    producer.transfer.revoke("revoked")
    producer.until(ended("revoked"))
    consumer.transfer.start_pull("late", params, [5], 0)
    (pull,) = consumer.until(pulled("late")).pulls
    assert (pull.ok, pull.reason) == (False, "released")


@pytest.mark.parametrize("change", [{"baton": None}, {"remote_port": "x"}, {"remote_block_ids": None}])
def test_incomplete_parameters_are_the_callers_fault(producer: Side, change: dict[str, Any]) -> None:
    params = producer.transfer.offer("r1", [1], 16, 0)
    with pytest.raises(EngineRequestError) as refusal:
        producer.transfer.check(params | change)
    assert refusal.value.status == 400


def test_a_killed_sidecar_voids_offers_and_comes_back_by_itself(producer: Side, consumer: Side) -> None:
    old = producer.transfer.offer("before", [1, 2], 32, 0)
    producer.kill_sidecar()
    producer.until(ended("before"), within_s=2)
    with pytest.raises(KvTransferUnavailable):
        while not producer.transfer.available:
            producer.transfer.offer("away", [1], 16, 0)
        raise KvTransferUnavailable("it was back before we could ask")
    producer.until_available()
    new = producer.transfer.offer("after", [1, 2], 32, 0)
    consumer.transfer.start_pull("stale", old, [1, 2], 0)
    assert not consumer.until(pulled("stale")).pulls[0].ok
    consumer.transfer.start_pull("fresh", new, [1, 2], 0)
    assert consumer.until(pulled("fresh")).pulls[0].ok
    assert consumer.block(1) == producer.block(1)


def test_a_pull_without_a_sidecar_fails_at_once(producer: Side, consumer: Side) -> None:
    params = producer.transfer.offer("r1", [1], 16, 0)
    consumer.kill_sidecar()
    consumer.until(lambda _: not consumer.transfer.available, within_s=2)
    consumer.transfer.start_pull("d1", params, [1], 0)
    (pull,) = consumer.transfer.poll().pulls
    assert (pull.ok, pull.reason) == (False, "sidecar_lost")
    consumer.until_available()
    consumer.transfer.poll()
    producer.until(ended("r1"))


def test_a_hanging_sidecar_is_killed_before_its_pulls_are_reported(producer: Side, consumer: Side) -> None:
    params = producer.transfer.offer("r1", [1], 16, 0)
    pid = consumer.sidecar.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    consumer.transfer.start_pull("d1", params, [1], 0)
    assert consumer.transfer.poll().pulls == []
    (pull,) = consumer.until(pulled("d1"), within_s=PULL_TIMEOUT_S + FENCE_GRACE_S + 2).pulls
    assert (pull.ok, pull.reason) == (False, "sidecar_lost")
    consumer.until_available()
    assert consumer.sidecar.pid != pid


def test_a_producer_whose_sidecar_hangs_goes_on_with_a_new_one(producer: Side) -> None:
    assert producer.sidecar.pid is not None
    os.kill(producer.sidecar.pid, signal.SIGSTOP)
    with pytest.raises(KvTransferUnavailable):
        producer.transfer.offer("r1", [1], 16, 0)
    producer.until(lambda _: not producer.transfer.available, within_s=5)
    producer.until_available()
    producer.transfer.offer("r2", [1], 16, 0)


def test_a_sidecar_that_can_not_start_says_so() -> None:
    own = OwnSidecar(SidecarCommand(engine_id="x", listen="256.0.0.1:0"))
    with pytest.raises(SidecarStartError, match="ended with"):
        own.start()
    own.stop()


def test_no_sidecar_survives_its_killed_engine(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from engine_adapter.sidecar_process import OwnSidecar, SidecarCommand\n"
        "own = OwnSidecar(SidecarCommand(engine_id='orphan', transport='shm')); own.start()\n"
        "print(own.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    pid = int(run.stdout)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1][:3]:
        assert time.monotonic() < deadline, "the sidecar outlived its engine"
        time.sleep(0.05)


@pytest.fixture
def keeper() -> Iterator[Side]:
    """With a store in memory."""
    side = Side("keeper", more=("--store-memory-bytes", "1MiB"))
    yield side
    side.close()


def store_events(side: Side, within_s: float) -> tuple[list[LoadResult], list[str]]:
    """Poll until a load or a save has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        side.transfer.poll()
        events = side.transfer.store.poll()
        if events.loads or events.ended_saves:
            return events.loads, events.ended_saves
        time.sleep(0.005)
    raise AssertionError("no load and no save has ended")


HASHES = [bytes([index]) * 32 for index in range(3)]


def test_saved_blocks_are_loaded_elsewhere_in_the_pool(keeper: Side) -> None:
    store = keeper.transfer.store
    assert store.available
    store.save("1", HASHES, [4, 5, 6])
    assert store_events(keeper, 10) == ([], ["1"])
    store.load("r", [*HASHES, b"x" * 32], [10, 11, 12, 13])
    ((load,), _) = store_events(keeper, 10)
    assert (load.request_id, load.num_blocks, load.reason) == ("r", 3, "missing")
    assert [keeper.block(10 + index) for index in range(3)] == [keeper.block(4 + index) for index in range(3)]


def test_a_sidecar_without_a_store_is_not_to_be_asked(producer: Side) -> None:
    assert not producer.transfer.store.available


def test_store_requests_end_when_the_sidecar_is_away(keeper: Side) -> None:
    keeper.kill_sidecar()
    keeper.until(lambda _: not keeper.transfer.available, within_s=2)
    assert not keeper.transfer.store.available
    keeper.transfer.store.load("r", HASHES, [1, 2, 3])
    keeper.transfer.store.save("1", HASHES, [1, 2, 3])
    keeper.transfer.store.abandon("r")
    ((load,), saves) = store_events(keeper, 1)
    assert (load.num_blocks, load.reason, saves) == (0, "sidecar_lost", ["1"])
    keeper.until_available()
    assert keeper.transfer.store.available


def test_a_sidecar_that_hangs_is_killed_before_its_loads_and_saves_are_reported(keeper: Side) -> None:
    """It might still read or write the blocks when it goes on."""
    pid = keeper.sidecar.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    keeper.transfer.store.save("1", HASHES, [4, 5, 6])
    keeper.transfer.store.load("r", HASHES, [1, 2, 3])
    keeper.transfer.poll()
    assert keeper.transfer.store.poll() == StoreEvents()
    ((load,), saves) = store_events(keeper, PULL_TIMEOUT_S + FENCE_GRACE_S + 2)
    assert (load.reason, saves) == ("sidecar_lost", ["1"])
    keeper.until_available()
    assert keeper.sidecar.pid != pid

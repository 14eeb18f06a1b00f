"""The sidecar as a thread of an engine's process, over its unix socket, with a pool that nobody else can map."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from sidecar.errors import LayoutRefused, SidecarError, StartError
from sidecar.in_process import InProcessSidecar
from sidecar.protocol import PoolMemory
from tests.sidecar_processes.harness import BLOCK_BYTES, FakeEngine, Sidecar, a_layout


class ThreadedSidecar:
    """What FakeEngine needs of a Sidecar."""

    def __init__(self, directory: Path, name: str, transport: str = "auto") -> None:
        self.name = name
        self.socket_path = str(directory / f"{name}.sock")
        self.sidecar = InProcessSidecar({"socket": self.socket_path, "engine_id": name, "transport": transport})
        self.ready_line = self.sidecar.start()


class PrivateEngine(FakeEngine):
    """Its pool is memory of this process alone, and is registered by its address."""

    def __init__(self, sidecar: ThreadedSidecar) -> None:
        super().__init__(sidecar)  # type: ignore[arg-type]
        self.buffer = ctypes.create_string_buffer(random.Random(5).randbytes(self.layout.pool_bytes))
        self.memory = PoolMemory("address", ctypes.addressof(self.buffer), num_bytes=self.layout.pool_bytes)
        self.epoch = self.client.register_memory(self.memory, self.layout)

    def block(self, block_id: int) -> bytes:
        return self.buffer.raw[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES]


@pytest.fixture
def threaded(directory: Path) -> Iterator[ThreadedSidecar]:
    sidecar = ThreadedSidecar(directory, "t")
    yield sidecar
    sidecar.sidecar.stop()


def test_it_reads_and_is_read_by_a_sidecar_that_is_a_process(directory: Path, threaded: ThreadedSidecar) -> None:
    assert threaded.ready_line.startswith("ready socket=")
    with Sidecar(directory, "p", "auto") as other, FakeEngine(other) as far, PrivateEngine(threaded) as near:
        read = near.pull(far.offer([3, 4, 9])[1], [10, 11, 12])
        assert (read.ok, read.transport) == (True, "shm")
        assert [near.block(b) for b in (10, 11, 12)] == [far.block(b) for b in (3, 4, 9)]
        offer, source = near.offer([10, 11, 12])
        given = far.pull(source, [20, 21, 22])
        assert (given.ok, given.transport) == (True, "tcp")  # its own memory can't be mapped by another process
        assert [far.block(b) for b in (20, 21, 22)] == [near.block(b) for b in (10, 11, 12)]
        assert near.offer_ended(offer.transfer_id) == "consumed"


def test_nothing_is_left_when_it_stops(directory: Path) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    sidecar = ThreadedSidecar(directory, "t")
    with PrivateEngine(sidecar) as engine:
        engine.offer([1, 2])
        sidecar.sidecar.stop()
        sidecar.sidecar.stop()
        with pytest.raises(SidecarError):
            engine.offer([3])
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    assert not os.path.exists(sidecar.socket_path)


def test_an_address_from_another_process_ends_its_connection(directory: Path) -> None:
    with Sidecar(directory, "p", "auto") as process:
        client = SidecarClient.connect(process.socket_path)
        with pytest.raises(SidecarError):
            client.register_memory(PoolMemory("address", 4096, num_bytes=a_layout().pool_bytes), a_layout())
        client.close()
        with FakeEngine(process) as engine:
            assert engine.epoch
        assert "an address of another process" in process.log_path.read_text()


@pytest.mark.parametrize(
    ("memory", "why"),
    [(PoolMemory("address", 4096, num_bytes=1), "the pool has 1"), (PoolMemory("vmm", num_bytes=1 << 40), "'vmm' is")],
)
def test_memory_that_cannot_be_is_refused(threaded: ThreadedSidecar, memory: PoolMemory, why: str) -> None:
    client = SidecarClient.connect(threaded.socket_path)
    with pytest.raises(LayoutRefused, match=why):
        client.register_memory(memory, a_layout())
    client.close()


def test_a_start_that_fails_says_why(directory: Path) -> None:
    with pytest.raises(StartError, match="listen"):
        InProcessSidecar({"socket": str(directory / "x.sock"), "engine_id": "t", "listen": "nowhere"}).start()
    with pytest.raises(StartError, match="rank"):
        InProcessSidecar({"socket": str(directory / "x.sock"), "engine_id": "t", "rank": -1})

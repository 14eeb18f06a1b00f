"""Device memory by the driver's key, with libraries that stand in for CUDA's and ACL's. It has not run on hardware."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.memory import device_keys
from engine_adapter.memory.choice import choose
from engine_adapter.memory.contract import Place, Pool
from sidecar.errors import LayoutRefused
from sidecar.protocol import PoolMemory
from tests.sidecar_processes.harness import BLOCK_BYTES, FakeEngine, Sidecar, a_layout

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in of the driver")
LIBRARIES = ("libcudart.so", "libcuda.so.1", "libascendcl.so")
OFFSET = 4096
"""The pool does not begin where its allocation does; an NPU exports the pool itself."""


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the stand-ins."""
    directory = tmp_path_factory.mktemp("drivers")
    source = Path(__file__).with_name("fake_device.c")
    first = directory / LIBRARIES[0]
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(first), str(source)], check=True)
    for name in LIBRARIES[1:]:
        (directory / name).symlink_to(first)
    return directory


@pytest.fixture
def found(drivers: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The stand-in in this process, and for the sidecars that it starts."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(drivers))
    paths = [(str(drivers / name),) for name in LIBRARIES]
    for name, path in zip(("CUDA_RUNTIME", "CUDA_DRIVER", "ACL"), paths, strict=True):
        monkeypatch.setattr(device_keys, name, path)
    library = ctypes.CDLL(str(drivers / LIBRARIES[0]))
    library.fake_allocate.restype = ctypes.c_void_p
    yield library
    for path in Path("/dev/shm").glob(f"baton-test-{os.getpid()}-*"):
        path.unlink()


class DeviceEngine(FakeEngine):
    """Its pool is the stand-in's device memory; `device` is cuda or npu."""

    def __init__(self, sidecar: Sidecar, library: ctypes.CDLL, device: Any) -> None:
        super().__init__(sidecar)
        size, address = self.layout.pool_bytes + OFFSET, ctypes.c_uint64()
        key = f"baton-test-{os.getpid()}-{device}-{sidecar.name}".encode()
        host = library.fake_allocate(key, ctypes.c_uint64(size), ctypes.byref(address))
        assert host
        offset = OFFSET if device == "cuda" else 0
        self.memory = (ctypes.c_char * self.layout.pool_bytes).from_address(host + offset)
        self.memory[:] = random.Random(sidecar.name).randbytes(self.layout.pool_bytes)
        pool = Pool(address.value + offset, self.layout.pool_bytes, None, device)
        provider = choose("device_ipc", Place(device, own_sidecar=True)).provider
        self.epoch = provider.enter(self.client, pool, self.layout)

    def block(self, block_id: int) -> bytes:
        return bytes(self.memory[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES])


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_blocks_go_between_devices_and_between_device_and_host(
    directory: Path, found: ctypes.CDLL, device: str
) -> None:
    with (
        Sidecar(directory, f"p-{device}", "auto") as p,
        Sidecar(directory, f"d-{device}", "auto") as d,
        Sidecar(directory, "h", "auto") as h,
        DeviceEngine(p, found, device) as producer,
        DeviceEngine(d, found, device) as consumer,
        FakeEngine(h) as on_host,
    ):
        many = [200, *range(150)]
        for source, target in ((producer, consumer), (consumer, on_host), (on_host, producer)):
            ended = target.pull(source.offer(many)[1], list(reversed(range(90, 241))))
            assert (ended.ok, ended.transport) == (True, "tcp"), ended
            there = [source.block(b) for b in many]
            assert [target.block(b) for b in reversed(range(90, 241))] == there


def test_a_key_that_nobody_gave_and_a_device_that_is_not_there_are_refused(directory: Path, found: Any) -> None:
    with Sidecar(directory, "p", "auto") as p, FakeEngine(p) as engine:
        size = engine.layout.pool_bytes
        for memory, why in (
            (PoolMemory("cuda_ipc", key=b"nowhere", num_bytes=size), "cudaIpcOpenMemHandle failed with 201"),
            (PoolMemory("npu_ipc", key=b"nowhere", num_bytes=size), "aclrtIpcMemImportByKey failed with 507899"),
            (PoolMemory("cuda_ipc", key=b"x", num_bytes=size, device=3), "cudaSetDevice failed with 101"),
        ):
            with pytest.raises(LayoutRefused, match=why):
                engine.client.register_memory(memory, engine.layout)


def test_without_the_library_it_says_so_and_what_to_use(directory: Path) -> None:
    with Sidecar(directory, "p", "auto") as p, FakeEngine(p) as engine:
        memory = PoolMemory("npu_ipc", key=b"x", num_bytes=engine.layout.pool_bytes)
        with pytest.raises(LayoutRefused, match=r"libascendcl\.so can be loaded; use memory provider staging"):
            engine.client.register_memory(memory, a_layout())

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.store.contract import Tier
from sidecar.store.memory import MemoryTier
from sidecar.store.mooncake import MooncakeSettings, MooncakeTier
from sidecar.store.posix import PosixTier
from sidecar.transport import mooncake

MAX_BYTES = 1 << 20
NEEDS_MOONCAKE = [
    pytest.mark.mooncake,
    pytest.mark.skipif(bool(mooncake.missing()), reason=mooncake.missing() or "mooncake is there"),
]
TIERS = ["memory", "posix", pytest.param("mooncake", marks=NEEDS_MOONCAKE)]


class Observer:
    """Remembers what a tier said."""

    def __init__(self) -> None:
        self.num_evicted = 0
        self.errors: Counter[str] = Counter()

    def evicted(self, tier: str, num_blocks: int) -> None:
        self.num_evicted += num_blocks

    def error(self, tier: str, kind: str) -> None:
        self.errors[kind] += 1


class Master:
    """A mooncake_master process."""

    def __init__(self) -> None:
        ports = [free_port(), free_port()]
        self.address = f"127.0.0.1:{ports[0]}"
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "mooncake_master"), f"--rpc_port={ports[0]}",
             f"--metrics_port={ports[1]}", "--rpc_address=127.0.0.1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", ports[0]), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "mooncake_master did not start"
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture(scope="module")
def master() -> Iterator[Master]:
    master = Master()
    yield master
    master.kill()


@pytest.fixture(scope="module")
def mooncake_tier(master: Master) -> Iterator[MooncakeTier]:
    """Shared, because it takes seconds to leave: tests use keys of their own."""
    tier = MooncakeTier(MooncakeSettings("127.0.0.1", master.address, 64 << 20), Observer())
    yield tier
    tier.close()


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, observer: Observer, tmp_path: Path) -> Iterator[Tier]:
    """One of each kind, empty, of one MiB (Mooncake: a little more)."""
    if request.param == "mooncake":
        yield request.getfixturevalue("mooncake_tier")
        return
    made: Tier
    if request.param == "memory":
        made = MemoryTier(MAX_BYTES, observer)
    else:
        made = PosixTier(tmp_path / "store", MAX_BYTES, observer)
    yield made
    made.close()

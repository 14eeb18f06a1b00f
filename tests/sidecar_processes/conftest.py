from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.transport import mooncake
from tests.sidecar_processes.harness import FakeEngine, Sidecar

NEEDS_MOONCAKE = [
    pytest.mark.mooncake,
    pytest.mark.skipif(bool(mooncake.missing()), reason=mooncake.missing() or "mooncake is there"),
]
TRANSPORTS = ["shm", "tcp", pytest.param("mooncake", marks=NEEDS_MOONCAKE)]
QUICK_CLAIMS = ("--claim-ttl-s", "0.6")
SLOW_COPY = ("--copy-bytes-per-s", str(256 * 1024))
"""Of a pool of 2 MiB: a transfer of 128 blocks takes four seconds."""


@dataclass
class Pair:
    """A producer and a consumer on sidecars that a whole module shares; tests leave them as they found them."""

    transport: str
    producer_sidecar: Sidecar
    consumer_sidecar: Sidecar
    producer: FakeEngine
    consumer: FakeEngine


@pytest.fixture(params=TRANSPORTS, scope="module")
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("pair")
    with (
        Sidecar(directory, "p", transport) as p,
        Sidecar(directory, "d", transport) as d,
        FakeEngine(p, seed=1) as producer,
        FakeEngine(d, seed=2) as consumer,
    ):
        yield Pair(transport, p, d, producer, consumer)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short enough for the path of a unix socket."""
    return tmp_path_factory.mktemp("s")

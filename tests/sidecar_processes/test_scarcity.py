"""Too few descriptors, no room for pools, more offers than anybody claims: refused in time, and over when it is."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from sidecar.errors import LayoutRefused
from tests.sidecar_processes.conftest import NEEDS_MOONCAKE
from tests.sidecar_processes.harness import FakeEngine, Sidecar, a_layout, eventually, raw_connection

QUICK = ("--connect-timeout-s", "1", "--open-timeout-s", "3", "--answer-timeout-s", "1")
LIMIT_S = 1 + 3 + 1
"""A first contact, at the latest: connect_timeout_s (twice, where the peer socket is tried) and open_timeout_s."""


@contextlib.contextmanager
def descriptors_left(sidecar: Sidecar, number: int) -> Iterator[None]:
    """Let the sidecar open `number` more; pytest itself has the rights to lift the limit again."""
    pid = sidecar.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir())
    free = sum(not Path(f"/proc/{pid}/fd/{number}").is_symlink() for number in range(highest))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(0, highest + 1 + number - free), before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("victim", ["producer", "consumer"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_first_contact_with_too_few_descriptors(directory: Path, transport: str, victim: str) -> None:
    """Wherever the last descriptor is taken: right or refused, in time, and right once there are some again."""
    with (
        Sidecar(directory, "p", transport, *QUICK) as p,
        Sidecar(directory, "d", transport, *QUICK) as d,
        FakeEngine(p, seed=1) as producer,
        FakeEngine(d, seed=2) as consumer,
    ):
        scarce = p if victim == "producer" else d
        outcomes = []
        assert consumer.pull(producer.offer([1])[1], [2]).ok
        before = scarce.usage()
        for number in range(7):
            consumer.client.register_pool(consumer.fd, consumer.layout)  # so that the next contact is the first
            consumer.fill(0)
            eventually(lambda: scarce.usage()[0] < before[0])
            _, source = producer.offer([3, 4])
            with descriptors_left(scarce, number):
                began = time.monotonic()
                ended = consumer.pull(source, [5, 6])
                assert time.monotonic() - began < LIMIT_S + 3
            outcomes.append(ended.reason or "ok")
            if not ended.ok:
                assert ended.reason in ("unreachable", "transport") and ended.message
                assert consumer.pool[:] == bytes(len(consumer.pool))
                eventually(lambda source=source: consumer.pull(source, [5, 6]).ok)  # type: ignore[misc]
            assert consumer.block(5) == producer.block(3) and consumer.block(6) == producer.block(4)
        assert outcomes[0] != "ok" and outcomes[-1] == "ok", outcomes
        eventually(lambda: scarce.usage()[0] <= before[0] and scarce.usage()[2] <= before[2])
        assert "Traceback" not in p.log_path.read_text() + d.log_path.read_text()


def test_strangers_who_take_every_descriptor_do_not_stop_those_who_are_connected(directory: Path) -> None:
    with (
        Sidecar(directory, "p", "shm", *QUICK) as p,
        Sidecar(directory, "d", "shm", *QUICK) as d,
        FakeEngine(p, seed=1) as producer,
        FakeEngine(d, seed=2) as consumer,
        contextlib.ExitStack() as strangers,
    ):
        assert consumer.pull(producer.offer([1])[1], [2]).ok
        before = p.usage()
        with descriptors_left(p, 20):
            for _ in range(60):
                strangers.enter_context(raw_connection(p.listen))
            eventually(lambda: "accept_failed" in p.log_path.read_text())
            for number in range(20):
                assert consumer.pull(producer.offer([number])[1], [2]).ok
            assert consumer.block(2) == producer.block(19)
            strangers.close()
        eventually(lambda: p.usage() == before)  # who says nothing is let go after connect_timeout_s
        assert p.log_path.read_text().count("accept_failed") < 100, "it spun"
        assert SidecarClient.connect(p.socket_path).close() is None


@pytest.mark.parametrize("transport", ["shm", "tcp", pytest.param("mooncake", marks=NEEDS_MOONCAKE)])
def test_no_room_in_dev_shm_is_nothing_to_a_sidecar(
    directory: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools are memfds, which take no room there."""
    fill_and_run = 'mount -t tmpfs -o size=16k full /dev/shm && (cat /dev/zero > /dev/shm/x; true) 2>&- && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", fill_and_run, "sh")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not to be had")
    monkeypatch.setattr(Sidecar, "prefix", prefix)
    with (
        Sidecar(directory, "p", transport) as p,
        Sidecar(directory, "d", transport) as d,
        FakeEngine(p, seed=1) as producer,
        FakeEngine(d, seed=2) as consumer,
    ):
        blocks = list(range(256))
        assert consumer.pull(producer.offer(blocks)[1], blocks).ok
        assert consumer.pool[:] == producer.pool[:]


def test_a_pool_in_a_full_file_system_is_refused_and_kills_nobody(directory: Path) -> None:
    """Memory that is not there is a SIGBUS at the first write: it has to be found out before."""
    full = directory / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "full", str(full)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted")
    try:
        with Sidecar(directory, "p", "shm") as sidecar, (full / "pool").open("w+b") as pool:
            os.ftruncate(pool.fileno(), a_layout().pool_bytes)
            client = SidecarClient.connect(sidecar.socket_path)
            with contextlib.closing(client), pytest.raises(LayoutRefused, match=r"No space left on.*2097152 bytes"):
                client.register_pool(pool.fileno(), a_layout())
            with FakeEngine(sidecar) as engine:
                engine.offer([1])
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_ten_thousand_offers_are_no_burden_to_a_pull(directory: Path) -> None:
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", "shm") as d,
        FakeEngine(p, seed=1) as producer,
        FakeEngine(d, seed=2) as consumer,
    ):

        def seconds() -> float:
            began = time.monotonic()
            for number in range(50):
                assert consumer.pull(producer.offer([number])[1], [number]).ok
            return time.monotonic() - began

        seconds()
        alone, resident = seconds(), p.resident_bytes()
        for number in range(10_000):
            producer.client.offer(f"r{number}", [number % 256], 16, 600.0)
        assert p.metric('baton_sidecar_leases{state="offered"}') == 10_000
        assert seconds() < 3 * alone + 1
        assert p.resident_bytes() - resident < 24 << 20
        producer.client.register_pool(producer.fd, producer.layout)
        assert p.metric('baton_sidecar_leases{state="offered"}') == 0
        assert len(producer.client.poll()) >= 10_000

"""The process as an operator meets it: flags, sockets, signals, pages, and what it leaves behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from sidecar.errors import LayoutRefused, OfferRefused, SidecarUnavailable
from tests.sidecar_processes.conftest import NEEDS_MOONCAKE, SLOW_COPY
from tests.sidecar_processes.harness import ROOT, FakeEngine, Sidecar, a_layout, eventually


def pd_sidecar(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [sys.executable, "-m", "sidecar.cli", *flags], cwd=ROOT, capture_output=True, text=True, timeout=30
    )


@pytest.fixture
def lone(directory: Path) -> Iterator[Sidecar]:
    with Sidecar(directory, "lone", "shm") as sidecar:
        yield sidecar


def test_the_ready_line_says_where_everything_is(lone: Sidecar) -> None:
    assert lone.ready_line.startswith(f"ready socket={lone.socket_path} listen=127.0.0.1:")
    assert lone.fields["transports"] == "shm" and lone.fields["metrics"].startswith("127.0.0.1:")


def test_sigterm_removes_the_socket_and_ends_with_zero(directory: Path) -> None:
    sidecar = Sidecar(directory, "p", "shm")
    with FakeEngine(sidecar) as engine:
        engine.offer([1])
        assert sidecar.stop() == 0
        assert not Path(sidecar.socket_path).exists()
        with pytest.raises(SidecarUnavailable):
            engine.client.offer("r", [1], 1, 1.0)
    assert "Traceback" not in sidecar.log_path.read_text()


def test_sigterm_lets_no_pull_go_unreported(directory: Path) -> None:
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", "shm", *SLOW_COPY) as d,
        FakeEngine(p) as producer,
        FakeEngine(d) as consumer,
    ):
        consumer.client.pull("slow", producer.offer(list(range(200)))[1], list(range(200)))
        time.sleep(0.3)
        assert d.stop() == 0
        ended = consumer.pull_ended("slow")
        assert not ended.ok and consumer.count("slow") == 1


def test_a_stale_socket_is_replaced_and_a_live_one_refused(directory: Path) -> None:
    first = Sidecar(directory, "p", "shm")
    refused = pd_sidecar("--socket", first.socket_path, "--engine-id", "p")
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].endswith("stop it or take another path")
    SidecarClient.connect(first.socket_path).close()  # the first is unharmed
    first.kill()
    assert Path(first.socket_path).exists()
    with Sidecar(directory, "p", "shm") as second:
        SidecarClient.connect(second.socket_path).close()


def test_a_file_in_the_way_is_not_removed(directory: Path) -> None:
    path = directory / "file"
    path.write_text("precious")
    refused = pd_sidecar("--socket", str(path), "--engine-id", "p")
    assert refused.returncode == 1 and path.read_text() == "precious"


@pytest.mark.parametrize("flag", ["--listen", "--metrics-port"])
def test_an_occupied_port_is_one_line_and_leaves_nothing(directory: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        value = f"127.0.0.1:{port}" if flag == "--listen" else str(port)
        refused = pd_sidecar("--socket", str(directory / "s"), "--engine-id", "p", "--transport", "shm", flag, value)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and flag in refused.stderr and str(port) in refused.stderr
    assert not (directory / "s").exists()


def test_a_wrong_flag_names_the_nearest_right_one() -> None:
    refused = pd_sidecar("--sockets", "x", "--socket", "y", "--engine-id", "p")
    assert refused.returncode == 2
    assert refused.stderr == "pd-sidecar: unknown argument --sockets; did you mean --socket?\n"


def test_standard_input_ends_a_child_whose_parent_died(directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sidecar.cli", "--socket", str(directory / "s"), "--engine-id", "p", "--transport",
         "shm", "--exit-on-stdin-eof"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin and process.stdout
    with process.stdout, process.stdin:
        assert process.stdout.readline().startswith(b"ready")
        process.stdin.close()
        assert process.wait(10) == 0
    assert not (directory / "s").exists()


def test_watching_a_standard_input_that_never_ends_is_refused(directory: Path) -> None:
    with open("/dev/null") as nothing:
        refused = subprocess.run(
            [sys.executable, "-m", "sidecar.cli", "--socket", str(directory / "s"), "--engine-id", "p",
             "--transport", "shm", "--exit-on-stdin-eof"], cwd=ROOT, stdin=nothing, capture_output=True, text=True,
            timeout=30,
        )  # fmt: skip
    assert refused.returncode == 1 and refused.stderr.startswith("pd-sidecar: --exit-on-stdin-eof: ")
    assert refused.stderr.count("\n") == 1 and not (directory / "s").exists()


def test_ten_thousand_offers_that_nobody_claims_leave_nothing(lone: Sidecar) -> None:
    with FakeEngine(lone) as engine:
        eventually(lambda: lone.usage()[2] == 1)
        before, resident = lone.usage(), lone.resident_bytes()
        for number in range(10_000):
            engine.client.offer(f"r{number}", [number % 256], 16, 0.5)
        eventually(lambda: lone.metric('baton_sidecar_offers_ended_total{outcome="expired"}') == 10_000)
        assert lone.metric('baton_sidecar_leases{state="offered"}') == 0
        eventually(lambda: lone.usage() == before)
        assert lone.resident_bytes() - resident < 12 << 20
        ended = {event.transfer_id for event in engine.client.poll()}  # type: ignore[union-attr]
        assert len(ended) == 10_000


def test_offers_that_cannot_be_are_refused(directory: Path) -> None:
    with Sidecar(directory, "p", "shm", "--max-leases", "2") as sidecar:
        client = SidecarClient.connect(sidecar.socket_path)
        with pytest.raises(OfferRefused, match="no pool"):
            client.offer("r", [1], 1, 1.0)
        client.close()
        with FakeEngine(sidecar) as engine:
            with pytest.raises(OfferRefused, match="block 256 is not in the pool of 256"):
                engine.client.offer("r", [256], 1, 1.0)
            with pytest.raises(OfferRefused, match="block -1"):
                engine.client.offer("r", [-1], 1, 1.0)
            for _ in range(2):
                engine.offer([1])
            with pytest.raises(OfferRefused, match="limit"):
                engine.offer([1])


def test_a_pool_that_does_not_fit_its_layout_is_refused(lone: Sidecar) -> None:
    with FakeEngine(lone) as engine:
        with pytest.raises(LayoutRefused, match="the layout needs 16384000 bytes, the pool has 2097152"):
            engine.client.register_pool(engine.fd, a_layout(2000))
        with pytest.raises(LayoutRefused, match="num_layers"):
            engine.client.register_pool(engine.fd, a_layout(num_layers=0))
        with pytest.raises(OfferRefused, match="no pool"):
            engine.offer([1])  # the old registration ended with the attempt
        engine.client.register_pool(engine.fd, engine.layout)
        engine.offer([1])


def test_pages(lone: Sidecar) -> None:
    status, text = lone.get("/healthz")
    assert status == 200 and '"engine_registered": false' in text and '"status": "ok"' in text
    status, text = lone.get("/metrics")
    assert status == 200
    for name in ("leases", "registered_bytes", "pulls_total", "pull_seconds", "offers_ended_total"):
        assert f"# TYPE baton_sidecar_{name}" in text or f"# TYPE baton_sidecar_{name.removesuffix('_total')}" in text


@pytest.mark.parametrize("consumer_transport", ["auto", pytest.param("mooncake", marks=NEEDS_MOONCAKE)])
def test_transports_that_do_not_meet(directory: Path, consumer_transport: str) -> None:
    """A consumer that may use shared memory does, on one host; one that may not has nothing in common with shm."""
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", consumer_transport) as d,
        FakeEngine(p) as producer,
        FakeEngine(d) as consumer,
    ):
        before = consumer.pool[:]
        ended = consumer.pull(producer.offer([1])[1], [2])
        if consumer_transport == "auto":
            assert ended.ok and ended.transport == "shm"
            link = f'baton_sidecar_peer_links{{peer="p@{p.listen}",transport="shm"}}'
            assert d.metric(link) == 1
            assert "peer_connected peer=p@" in d.log_path.read_text()
        else:
            assert (ended.ok, ended.reason) == (False, "incompatible")
            assert "no common transport: here mooncake, the producer has shm" in ended.message
            assert consumer.pool[:] == before


@pytest.mark.parametrize("marked", [pytest.param("", marks=NEEDS_MOONCAKE)])
def test_health_is_red_while_the_serving_mooncake_process_is_dead(directory: Path, marked: str) -> None:
    with (
        Sidecar(directory, "p", "mooncake") as p,
        Sidecar(directory, "d", "mooncake") as d,
        FakeEngine(p) as producer,
        FakeEngine(d) as consumer,
    ):
        assert consumer.pull(producer.offer([1])[1], [2]).ok
        [serving] = p.children()
        subprocess.run(["kill", "-9", str(serving)], check=True)
        eventually(lambda: p.get("/healthz")[0] == 503)
        _, source = producer.offer([3])
        eventually(lambda: consumer.pull(source, [4]).ok)  # served again by a new process
        assert consumer.block(4) == producer.block(3)
        assert p.get("/healthz")[0] == 200


@pytest.mark.parametrize("protocol", [pytest.param(name, marks=NEEDS_MOONCAKE) for name in ("rdma", "ascend")])
def test_a_protocol_that_this_machine_lacks_is_refused_not_replaced(directory: Path, protocol: str) -> None:
    refused = pd_sidecar(
        "--socket", str(directory / "s"), "--engine-id", "p", "--transport", "mooncake", "--mooncake-protocol", protocol
    )
    assert refused.returncode == 1 and protocol in refused.stderr.strip().splitlines()[-1]
    assert "Traceback" not in refused.stderr


def test_a_sidecar_whose_engine_was_killed_removes_the_directory_made_for_it(directory: Path) -> None:
    own = directory / "own"
    own.mkdir()
    command = [
        sys.executable, "-m", "sidecar.cli", "--socket", str(own / "s"), "--engine-id", "e", "--transport", "shm",
        "--exit-on-stdin-eof", "--remove-directory",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline().startswith("ready") and own.exists()
    process.stdin.close()
    assert process.wait(30) == 0 and not own.exists()
    process.stdout.close()

"""Two hosts with a bad network between them: slow, lossy, cut, or open in one direction only.

Each host is a network namespace; a process in between passes packets, or does not (see wire.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.protocol import PullEnded
from tests.sidecar_processes.conftest import NEEDS_MOONCAKE
from tests.sidecar_processes.harness import ROOT, FakeEngine, Sidecar, eventually
from tests.sidecar_processes.test_two_hosts import HOSTS, run, skip_unless

BLOCKS = list(range(128))
ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, CLAIM_TTL_S, PEER_GONE_S = 1.2, 1.5, 1.2, 3.0
SLACK_S = 2.0
FLAGS = (
    "--answer-timeout-s", str(ANSWER_TIMEOUT_S), "--connect-timeout-s", str(CONNECT_TIMEOUT_S),
    "--claim-ttl-s", str(CLAIM_TTL_S), "--peer-gone-s", str(PEER_GONE_S), "--stop-grace-s", "0.5",
)  # fmt: skip
UNANSWERED_S = ANSWER_TIMEOUT_S + CLAIM_TTL_S / 3
SLOW_COPY = ("--copy-bytes-per-s", str(512 * 1024))
"""A transfer of BLOCKS takes two seconds."""


class Namespaced(Sidecar):
    """A sidecar on one of the two hosts; its engine socket is a file and so reachable from here."""

    def __init__(self, directory: Path, name: str, namespace: str, transport: str, *flags: str) -> None:
        self.prefix = ("ip", "netns", "exec", namespace)
        super().__init__(directory, name, transport, *flags, listen=f"{HOSTS[name]}:0")


@dataclass
class Network:
    """The link between the two namespaces."""

    namespaces: dict[str, str]
    process: subprocess.Popen[str]

    def set(self, **link: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(link) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ok\n"

    @contextlib.contextmanager
    def being(self, **link: object) -> Iterator[None]:
        self.set(**link)
        try:
            yield
        finally:
            self.set()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with contextlib.ExitStack() as stack:
        names = {end: f"baton-net-{end}-{os.getpid()}" for end in HOSTS}
        for name in names.values():
            skip_unless(run("ip", "netns", "add", name))
            stack.callback(run, "ip", "netns", "del", name)
        devices = {end: f"bt{end}{os.getpid()}" for end in HOSTS}
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tests.sidecar_processes.wire", *devices.values()], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
        )  # fmt: skip
        stack.callback(process.kill)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip("/dev/net/tun is not to be had")
        for end, name in names.items():
            skip_unless(run("ip", "link", "set", devices[end], "netns", name))
            for step in (
                f"addr add {HOSTS[end]}/24 dev {devices[end]}",
                "link set lo up",
                f"link set {devices[end]} up",
            ):
                skip_unless(run("ip", "-n", name, *step.split()))
        yield Network(names, process)


@dataclass
class Hosts:
    network: Network
    producer_sidecar: Sidecar
    consumer_sidecar: Sidecar
    producer: FakeEngine
    consumer: FakeEngine


@pytest.fixture(scope="module")
def hosts(
    network: Network, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hosts]:
    directory = tmp_path_factory.mktemp("s")
    with (
        Namespaced(directory, "p", network.namespaces["p"], request.param, *FLAGS) as p,
        Namespaced(directory, "d", network.namespaces["d"], request.param, *FLAGS, *SLOW_COPY) as d,
        FakeEngine(p, seed=1) as producer,
        FakeEngine(d, seed=2) as consumer,
    ):
        yield Hosts(network, p, d, producer, consumer)


@pytest.fixture(autouse=True)
def still_works(hosts: Hosts) -> Iterator[None]:
    """Before and after, with nothing more held than before."""
    eventually(lambda: hosts.consumer.pull(hosts.producer.offer([1])[1], [2]).ok)
    before = hosts.producer_sidecar.usage(), hosts.consumer_sidecar.usage()
    yield
    eventually(lambda: hosts.consumer.pull(hosts.producer.offer([1])[1], [2]).ok)
    assert hosts.consumer.block(2) == hosts.producer.block(1)
    for sidecar, (descriptors, _, mappings) in zip(
        (hosts.producer_sidecar, hosts.consumer_sidecar), before, strict=True
    ):
        eventually(lambda s=sidecar, d=descriptors: s.usage()[0] <= d, PEER_GONE_S + 15)  # type: ignore[misc]
        assert sidecar.usage()[2] == mappings


SLOW, LOSSY = {"delay_s": 0.1}, {"loss": 0.01, "delay_s": 0.005}
CUT, DEAF, MUTE = {"a_to_b": False, "b_to_a": False}, {"a_to_b": False}, {"b_to_a": False}
"""DEAF: the consumer hears nothing; MUTE: it is not heard. Either is what is called half-open."""


def over(transport: str, link: dict[str, object], name: str) -> object:
    marks = NEEDS_MOONCAKE if transport == "mooncake" else []
    return pytest.param(transport, link, id=f"{transport}-{name}", marks=marks)


@pytest.mark.parametrize(
    ("hosts", "link"),
    [over("tcp", SLOW, "round trip of 200 ms"), over("tcp", LOSSY, "loss"), over("mooncake", LOSSY, "loss")],
    indirect=["hosts"],
)
def test_a_bad_network_is_slow_and_nothing_else(hosts: Hosts, link: dict[str, float]) -> None:
    with hosts.network.being(**link):
        for number in range(2):
            remote, local = BLOCKS[number::2], list(reversed(BLOCKS[number::2]))
            began = time.monotonic()
            offer, source = hosts.producer.offer(remote)
            ended = hosts.consumer.pull(source, local)
            assert ended.ok, ended
            assert time.monotonic() - began > 2 * link["delay_s"]
            assert [hosts.consumer.block(b) for b in local] == [hosts.producer.block(b) for b in remote]
            assert hosts.producer.offer_ended(offer.transfer_id) == "consumed"


@pytest.mark.parametrize(
    ("hosts", "link"),
    [over("tcp", CUT, "cut"), over("tcp", DEAF, "deaf"), over("tcp", MUTE, "mute"), over("mooncake", CUT, "cut")],
    indirect=["hosts"],
)
def test_a_network_that_is_lost_in_mid_transfer(hosts: Hosts, link: dict[str, bool]) -> None:
    producer, consumer = hosts.producer, hosts.consumer
    offer, source = producer.offer(BLOCKS)
    consumer.fill(0)
    consumer.client.pull("cut", source, BLOCKS)
    eventually(lambda: any(consumer.pool[:: 8192 // 2]))
    with hosts.network.being(**link):
        lost_at = time.monotonic()
        ended = consumer.pull_ended("cut", 20)
        assert (ended.ok, ended.reason) == (False, "unreachable")
        assert time.monotonic() - lost_at < UNANSWERED_S + CLAIM_TTL_S / 3 + SLACK_S
        consumer.fill(42)
        began = time.monotonic()
        assert consumer.pull(source, BLOCKS).reason == "unreachable"
        assert time.monotonic() - began < CONNECT_TIMEOUT_S + SLACK_S
        assert consumer.pool[:] == bytes([42]) * len(consumer.pool)
    time.sleep(0.5)  # what the network still had
    assert consumer.pool[:] == bytes([42]) * len(consumer.pool)
    last: list[PullEnded] = []

    def read_again() -> bool:
        """As soon as the producer has noticed, or at the latest when the lease of the first claim is over."""
        last[:] = [consumer.pull(source, BLOCKS)]
        return last[0].ok or last[0].reason == "expired"

    eventually(read_again, PEER_GONE_S + 2 * CLAIM_TTL_S + SLACK_S)
    if last[0].ok:
        assert [consumer.block(b) for b in BLOCKS] == [producer.block(b) for b in BLOCKS]
    else:
        assert producer.offer_ended(offer.transfer_id) == "expired"
    consumer.events.clear()


@pytest.mark.parametrize(
    ("hosts", "link"),
    [over("tcp", CUT, "cut"), over("tcp", DEAF, "deaf"), over("tcp", MUTE, "mute")],
    indirect=["hosts"],
)
def test_a_network_that_is_lost_before_a_claim(hosts: Hosts, link: dict[str, bool]) -> None:
    before = hosts.consumer.pool[:]
    _, source = hosts.producer.offer(BLOCKS[:8])
    with hosts.network.being(**link):
        began = time.monotonic()
        assert hosts.consumer.pull(source, BLOCKS[:8]).reason == "unreachable"
        assert time.monotonic() - began < UNANSWERED_S + CLAIM_TTL_S / 3 + CONNECT_TIMEOUT_S + SLACK_S
        assert hosts.consumer.pool[:] == before
    eventually(lambda: hosts.consumer.pull(source, BLOCKS[:8]).ok)
    assert [hosts.consumer.block(b) for b in BLOCKS[:8]] == [hosts.producer.block(b) for b in BLOCKS[:8]]


@pytest.mark.parametrize("hosts", ["tcp"], indirect=True)
def test_peers_that_vanish_leave_nothing(hosts: Hosts) -> None:
    """No packet of theirs ever ends their connections, with nothing under way that would be missed."""
    with_peer = hosts.producer_sidecar.usage()[0]
    with hosts.network.being(a_to_b=False, b_to_a=False):
        eventually(lambda: hosts.producer_sidecar.usage()[0] < with_peer, PEER_GONE_S + 10)

"""Two hosts on one machine: a sidecar each in its own network namespace, a link between them that delays and loses."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sidecar_processes.harness import FakeEngine, Sidecar

HOSTS = {"p": "10.211.77.1", "d": "10.211.77.2"}
QDISCS = {"plain": "", "delayed": "delay 20ms", "lossy": "delay 5ms loss 1%"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=30)


def skip_unless(done: subprocess.CompletedProcess[str]) -> None:
    """Skip, with what was said, if this machine does not let us do that."""
    if done.returncode:
        pytest.skip(f"{' '.join(done.args)}: {done.stderr.strip()}")


class Namespaced(Sidecar):
    """A sidecar in a namespace; its engine socket is a file and so reachable from here."""

    def __init__(self, directory: Path, name: str, namespace: str) -> None:
        self.prefix = ("ip", "netns", "exec", namespace)
        super().__init__(directory, name, "auto", listen=f"{HOSTS[name]}:0")

    def metrics(self) -> str:
        url = f"http://{self.fields['metrics']}/metrics"
        code = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())"
        return run(*self.prefix, "python3", "-c", code, url).stdout


@pytest.fixture(params=QDISCS)
def namespaces(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("iproute2 is not installed")
    names = {end: f"baton-{end}-{os.getpid()}" for end in HOSTS}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            skip_unless(run("ip", "netns", "add", name))
            stack.callback(run, "ip", "netns", "del", name)
        skip_unless(run(*f"ip -n {names['p']} link add eth-p type veth peer name eth-d netns {names['d']}".split()))
        for end, name in names.items():
            for step in (f"addr add {HOSTS[end]}/24 dev eth-{end}", "link set lo up", f"link set eth-{end} up"):
                done = run("ip", "-n", name, *step.split())
                assert done.returncode == 0, f"{step}: {done.stderr}"
            if rule := QDISCS[request.param]:
                skip_unless(run("tc", "-n", name, *f"qdisc add dev eth-{end} root netem {rule}".split()))
        yield names


def test_blocks_cross_between_two_hosts(namespaces: dict[str, str], directory: Path) -> None:
    with (
        Namespaced(directory, "p", namespaces["p"]) as p,
        Namespaced(directory, "d", namespaces["d"]) as d,
        FakeEngine(p, seed=1) as producer,
        FakeEngine(d, seed=2) as consumer,
    ):
        for number in range(3):
            remote, local = list(range(number, 256, 3)), list(range(255 - number, -1, -3))[: len(range(number, 256, 3))]
            offer, source = producer.offer(remote)
            assert source.host == HOSTS["p"]
            ended = consumer.pull(source, local, deadline_s=60)
            assert ended.ok, ended
            assert [consumer.block(b) for b in local] == [producer.block(b) for b in remote]
            assert producer.offer_ended(offer.transfer_id) == "consumed"
        assert ended.transport == "tcp"  # an abstract socket stays in its namespace: not one host
        assert 'transport="tcp"' in d.metrics()

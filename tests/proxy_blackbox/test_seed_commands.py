"""The proxy commands of the seed documents are commands of ours: letter by letter but for the script's name in a
network where their addresses are loopback's, and in any other with the addresses changed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    HOST,
    PROXY,
    ROOT,
    Engines,
    Process,
    body_of,
    eventually,
    free_port,
    request,
    text_for,
)
from tests.proxy_blackbox.seed_commands import COMMANDS

SIXTEEN = " ".join(map(str, range(7100, 7116)))
# name: (flags, number of prefillers, number of decoders); PORT is the proxy's own
SEEDS = {
    "000": (
        "--host 127.0.0.1 --port PORT --prefiller-hosts 127.0.1.1 --prefiller-port 13700 "
        "--decoder-hosts 127.0.1.1 --decoder-ports 13701",
        (1, 1),
    ),
    "001": (
        "--host 127.0.0.1 --port PORT --prefiller-hosts 127.0.1.49 --prefiller-port 20002 "
        "--decoder-hosts 127.0.1.51 --decoder-ports 20002",
        (1, 1),
    ),
    "002": (
        "--host 127.0.0.1 --port PORT --prefiller-hosts 127.0.1.1 --prefiller-port 13700 "
        "--decoder-hosts 127.0.1.2 127.0.1.3 --decoder-ports 13700 13700",
        (1, 2),
    ),
    "003 host twice": (
        "--host 127.0.0.1 --port PORT --host 127.0.0.1 "
        "--prefiller-hosts 127.0.1.1 127.0.1.1 127.0.1.2 127.0.1.2 --prefiller-ports 7100 7101 7100 7101 "
        f"--decoder-hosts {'127.0.1.3 ' * 16} {'127.0.1.4 ' * 16} --decoder-ports {SIXTEEN} {SIXTEEN}",
        (4, 32),
    ),
    "003 repetitions and increments": (
        "--port PORT --host 127.0.0.1 "
        "--prefiller-hosts 127.0.1.1 127.0.1.2 --prefiller-hosts-num 2 2 "
        "--prefiller-ports 7100 7100 --prefiller-ports-inc 2 2 "
        "--decoder-hosts 127.0.1.3 127.0.1.4 --decoder-hosts-num 16 16 "
        "--decoder-ports 7100 7100 --decoder-ports-inc 16 16",
        (4, 32),
    ),
    "004 two nodes": (
        "--port PORT --host 127.0.0.1 "
        "--prefiller-hosts 127.0.1.1 127.0.1.1 127.0.1.2 127.0.1.2 --prefiller-ports 9000  9001 9000 9001 "
        "--decoder-hosts 127.0.1.3 127.0.1.3 127.0.1.4 127.0.1.4 --decoder-ports 9000 9001 9000 9001",
        (4, 4),
    ),
    "004 one node": (
        "--port PORT --host 127.0.0.1 --prefiller-hosts 127.0.1.1 127.0.1.1 --prefiller-ports 9000  9001 "
        "--decoder-hosts 127.0.1.2 127.0.1.2 --decoder-ports 9000 9001",
        (2, 2),
    ),
}


def healthcheck_of(flags: str, port: int, process: Process) -> dict[str, object]:
    """What /healthcheck says once it is served."""
    found: dict[str, object] = {}

    def wrong() -> object:
        assert process.popen.poll() is None, process.output
        try:
            found.update(request(port, "GET", "/healthcheck").json)
        except OSError as error:
            return error
        return None

    eventually(wrong, flags, 15)
    return found


@pytest.mark.parametrize(("flags", "counts"), SEEDS.values(), ids=SEEDS)
def test_a_seeds_command_starts(flags: str, counts: tuple[int, int]) -> None:
    port = free_port()
    process = Process([PROXY, *flags.replace("PORT", str(port)).split()])
    try:
        found = healthcheck_of(flags, port, process)
        assert (found["prefill_instances"], found["decode_instances"]) == counts
    finally:
        assert process.stop() == 0


@pytest.mark.parametrize("singular", ["--prefiller-port", "--prefiller-ports"])
def test_a_seeds_command_serves(engines: Engines, singular: str) -> None:
    port = free_port()
    flags = f"--host {HOST} --port {port} --prefiller-hosts {HOST} {singular} {engines.prefill[0]} "
    flags += f"--decoder-hosts {HOST} {HOST} --decoder-port {engines.decode[0]} {engines.decode[1]}"
    process = Process([PROXY, *flags.split()])
    try:
        healthcheck_of(flags, port, process)
        fields = body_of(CHAT, stream=True)
        assert request(port, "POST", CHAT, fields).text == text_for(fields)
    finally:
        assert process.stop() == 0


def own_network() -> list[str]:
    """A command's beginning: it runs in a network of its own, in which it is root."""
    for prefix in (["unshare", "-n"], ["unshare", "-rn"]):
        if all(map(shutil.which, ("unshare", "ip"))) and subprocess.run([*prefix, "true"], check=False).returncode == 0:
            return prefix
    pytest.skip("unshare -n is not permitted here")


@pytest.mark.parametrize("seed", COMMANDS)
def test_a_seeds_command_runs_verbatim_and_serves(seed: str) -> None:
    contract = "layerwise" if "layerwise" in seed else "pull"  # found by itself: the commands do not say
    inner = [sys.executable, "-m", "tests.proxy_blackbox.own_network", COMMANDS[seed].lstrip("\n"), contract]
    ended = subprocess.run([*own_network(), *inner], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]

"""`pd-cluster ranktable`: the rank table, by gen_ranktable.sh's flags on every node at once, or from a deployment."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import shlex
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from engine_adapter.cluster import deployment_rules, npu_tools
from engine_adapter.cluster.deployment import Deployment
from engine_adapter.cluster.errors import ClusterError, ConfigError
from engine_adapter.cluster.rank_table import Entry, entries_of, is_complete, rank_table, table, text_of
from engine_adapter.cluster.rank_table_exchange import exchanged
from engine_adapter.cluster.topology import topology

WHAT = "write LLMDataDist's rank table, from FILE or by gen_ranktable.sh's flags"
COUNTS = ("prefill_device_cnt", "decode_device_cnt")
DEFAULT_PORT = 6657
"""gen_ranktable.sh's MASTER_PORT."""


def add_to(commands: Any) -> Any:
    """`commands`: what `add_subparsers` gave."""
    command = commands.add_parser("ranktable", help=WHAT, description=WHAT, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a deployment with its nodes: all at once")
    command.add_argument("--ips", nargs="+", default=[], help="addresses of all nodes, prefillers first; run on each")
    command.add_argument("--npus-per-node", type=int, default=8, help="devices of each node (%(default)s)")
    command.add_argument("--network-card-name", default="", help="this node's network card, which has one of --ips")
    command.add_argument("--prefill-device-cnt", type=int, help="devices that prefill: the first of all")
    command.add_argument("--decode-device-cnt", type=int, help="devices that decode: the next ones")
    command.add_argument("--local-device-ids", default="", help="this node's devices, such as 0,1; all if not given")
    command.add_argument("--local-host", default="", help="which of --ips this node is, if the card doesn't tell")
    command.add_argument("--hardware", choices=("A2", "A3"), help="if not given, A3 where a card has two chips")
    command.add_argument("--ranktable-path", type=Path, default=Path("ranktable.json"), help="(%(default)s)")
    command.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="of the first node, for the others (%(default)s)"
    )
    command.add_argument("--timeout-s", type=float, default=180.0, help="to wait for the other nodes (%(default)s)")
    command.add_argument(
        "--remote-shell", default="ssh -o BatchMode=yes", help="with FILE: how other nodes' tools are run (%(default)s)"
    )
    command.add_argument("--force", action="store_true", help="also if the file is there (as GEN_RANKTABLE=1)")
    return command


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.ranktable_path
    if path.exists() and not (arguments.force or os.environ.get("GEN_RANKTABLE")):
        print(f"{path} is there already and stays as it is; --force or GEN_RANKTABLE=1 writes it anew")
        return 0
    if (arguments.file is None) == (not arguments.ips):
        raise ConfigError("ranktable: give FILE, or --ips of all nodes, one of the two")
    if arguments.file is not None:
        for flag in ("local_device_ids", "local_host", "network_card_name", "hardware", *COUNTS):
            if getattr(arguments, flag) not in (None, ""):
                raise ConfigError(f"ranktable: --{flag.replace('_', '-')} goes with --ips; {arguments.file} says it")
    text = _from_file(arguments) if arguments.file else _from_flags(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)
    print(f"{path}: written")
    return 0


def _from_file(arguments: argparse.Namespace) -> str:
    deployment = deployment_rules.load(arguments.file)
    where = topology(deployment)
    entries = list(entries_of(deployment, where))
    if not entries:
        raise ClusterError(f"{arguments.file}: no instance has a device")
    if not is_complete(entries):
        entries = _asked(deployment, entries, shlex.split(arguments.remote_shell))
    return text_of(rank_table(entries, where))


def _asked(deployment: Deployment, entries: Sequence[Entry], remote_shell: list[str]) -> list[Entry]:
    """With what the tools of each node say, one node after the other."""
    known: dict[tuple[str, int], Entry] = {}
    for node in deployment.node:
        devices = [entry.device_id for entry in entries if entry.server_id == node.address]
        if devices and node.hardware in ("A2", "A3"):
            shell = [] if is_here(node.address) else remote_shell
            hardware: Literal["A2", "A3"] = "A3" if node.hardware == "A3" else "A2"
            for entry in npu_tools.entries_on(node.address, devices, hardware, remote_shell=shell):
                known[entry.server_id, entry.device_id] = entry
    return [known.get((entry.server_id, entry.device_id), entry) for entry in entries]


def _from_flags(arguments: argparse.Namespace) -> str:
    ips: list[str] = arguments.ips
    num_prefill, num_decode = arguments.prefill_device_cnt, arguments.decode_device_cnt
    for flag, number in (("--prefill-device-cnt", num_prefill), ("--decode-device-cnt", num_decode)):
        if number is None or number < 0:
            raise ConfigError(f"ranktable: {flag} is needed, a number of devices")
    if len(set(ips)) < len(ips):
        raise ConfigError("ranktable: --ips names a node twice")
    local = _local_host(arguments)
    cards, chips = npu_tools.cards_and_chips()
    hardware: Literal["A2", "A3"] = arguments.hardware or ("A3" if chips > 1 else "A2")
    devices = _device_ids(arguments, cards * chips)
    mine = npu_tools.entries_on(local, devices, hardware, chips_per_card=chips)
    every = asyncio.run(exchanged(ips, ips.index(local), mine, arguments.port, arguments.timeout_s))
    if num_prefill + num_decode > len(every):
        raise ClusterError(
            f"--prefill-device-cnt {num_prefill} and --decode-device-cnt {num_decode} are more than the "
            f"{len(every)} devices of all nodes"
        )
    return text_of(table(every, num_prefill, num_decode, len(ips)))


def _device_ids(arguments: argparse.Namespace, num_there: int) -> list[int]:
    said = arguments.local_device_ids
    words = said.split(",") if said else [str(i) for i in range(min(arguments.npus_per_node, num_there))]
    if not all(word.strip().isdigit() for word in words):
        raise ConfigError(f"--local-device-ids {said}: give numbers with commas between them, such as 0,1")
    devices = [int(word) for word in words]
    beyond = [device for device in devices if device >= num_there]
    if beyond or len(set(devices)) < len(devices):
        raise ConfigError(f"--local-device-ids {said}: give each of this node's 0 to {num_there - 1} once at most")
    return devices


def _local_host(arguments: argparse.Namespace) -> str:
    ips: list[str] = arguments.ips
    if arguments.local_host:
        if arguments.local_host not in ips:
            raise ConfigError(f"--local-host {arguments.local_host} is not one of --ips")
        return str(arguments.local_host)
    here = [ip for ip in ips if is_here(ip)]
    if len(here) > 1 and arguments.network_card_name:
        here = [ip for ip in here if ip == card_address(arguments.network_card_name)]
    if len(here) != 1:
        which = "several" if here else "none"
        raise ClusterError(f"{which} of --ips {' '.join(ips)} is an address of this machine; say which by --local-host")
    return here[0]


def is_here(address: str) -> bool:
    """Whether an address is one of this machine's: it can be bound."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, *_, place in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(place)
            except OSError:
                continue
            return True
    return False


def card_address(name: str) -> str:
    """IPv4 address of a network card; empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])

"""Engines and a proxy of each contract, for the tests of the contracts."""

from __future__ import annotations

import json
import re
import socket
import struct
from typing import Any

from tests.proxy_blackbox.harness import HOST, Engines, Proxy, eventually, raw_post

CONTRACTS = ("pull", "layerwise", "mooncake", "sglang", "p2p-nccl")
SHORT_TIMEOUTS = (
    *("--connect-timeout-s", "1", "--prefill-timeout-s", "1.5", "--first-token-timeout-s", "2"),
    *("--between-tokens-timeout-s", "1", "--health-retry-interval-s", "0.1", "--reclaim-timeout-s", "1"),
)


def ports_flags(engines: Engines) -> list[str]:
    """A mock engine's bootstrap and KV ports are its HTTP port."""
    prefill, decode = [str(port) for port in engines.prefill], [str(port) for port in engines.decode]
    flags = ["--prefiller-bootstrap-ports", *prefill, "--prefiller-kv-ports", *prefill]
    return [*flags, "--decoder-kv-ports", *decode]


def proxy_for(engines: Engines, contract: str, *flags: str) -> Proxy:
    return Proxy(engines, "--contract", contract, *ports_flags(engines), *SHORT_TIMEOUTS, *flags)


def begun(proxy: Proxy, path: str, fields: dict[str, Any]) -> socket.socket:
    """A request whose answer nobody has read yet."""
    sock = socket.create_connection((HOST, proxy.port), timeout=10)
    sock.sendall(raw_post(path, json.dumps(fields).encode()))
    return sock


def called_off(proxy: Proxy, engines: Engines, *roles: str) -> None:
    """The legs on instances of these roles are aborted soon, and not because their time was up."""

    def num_timeouts() -> int:
        found = re.findall(
            rb'^pd_proxy_retries_total\{.*failure="timeout".*\} (\S+)$', proxy.get("/metrics").body, re.M
        )
        return sum(int(float(one)) for one in found)

    before = num_timeouts()
    for role in roles:
        eventually(lambda of=role: not engines.count(of, "aborted"), f"the {role} was not aborted")
    assert num_timeouts() == before


def leave(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

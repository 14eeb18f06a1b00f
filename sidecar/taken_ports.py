"""Ports that Mooncake takes for itself, at random: nothing fixed of ours may lie among them. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from sidecar.config import SidecarConfig, split_address
from sidecar.errors import UsageError

MOONCAKE_PORTS = (15000, 17000)
"""MC_MIN_RPC_PORT and MC_MAX_RPC_PORT, each of the two included (spec/mooncake.md)."""
ADXL_BASE_PORT = 20000
"""ASCEND_BASE_PORT; chip n listens somewhere in the n-th thousand from there on (spec/kv-contracts.md 3.1)."""
ADXL_PORTS_PER_CHIP = 1000
MAX_CHIPS = 16
"""Of one node: a neighbour's port is taken as well as that of the chip beside this sidecar."""


def check_ports(config: SidecarConfig, environment: Mapping[str, str]) -> None:
    """Raises UsageError where a port that was asked for is among those of a transport that is on."""
    if config.transport not in ("mooncake", "auto") or (
        config.transport == "auto" and config.mooncake_protocol == "tcp"
    ):
        return  # with auto and tcp, Mooncake comes after our own tcp, which every peer of ours has
    for flag, port in (("--listen", split_address(config.listen)[1]), ("--metrics-port", config.metrics_port)):
        if why := _taken(port, config.mooncake_protocol, environment):
            raise UsageError(f"{flag}: port {port} is among {why}; take one outside, for example {_outside(port)}")


def _taken(port: int, protocol: str, environment: Mapping[str, str]) -> str:
    first = _number(environment, "MC_MIN_RPC_PORT", MOONCAKE_PORTS[0])
    last = _number(environment, "MC_MAX_RPC_PORT", MOONCAKE_PORTS[1])
    if first <= port <= last:
        return f"the {first}-{last} that Mooncake takes at random"
    first = _number(environment, "ASCEND_BASE_PORT", ADXL_BASE_PORT)
    last = first + MAX_CHIPS * ADXL_PORTS_PER_CHIP - 1
    if protocol == "ascend" and first <= port <= last:
        return f"the {first}-{last} where ADXL listens, {ADXL_PORTS_PER_CHIP} for each physical chip"
    return ""


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


def _outside(port: int) -> int:
    """Above Mooncake's ports and below ADXL's, where both have their defaults."""
    return 17001 + port % (ADXL_BASE_PORT - 17001)

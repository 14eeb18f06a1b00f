"""Which ports and devices of each node are taken, and by whom; what clashes is kept, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from engine_adapter.cluster.connectors import FACTS, MOONCAKE_PORTS, ConnectorFacts, adxl_ports
from engine_adapter.cluster.deployment import Deployment, Node

UNKNOWN = ConnectorFacts(contract="pull", ports="none")
"""Of a connector that is not in the table, which the rules refuse."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Something in the file that can't be: `key` = `value`, why, and what to do instead."""

    key: str
    value: str
    reason: str
    remedy: str


def facts_of(deployment: Deployment) -> ConnectorFacts:
    """Ours is told in `connector.extra` to push; any other speaks one contract."""
    kind, connector = deployment.engine.kind, deployment.connector
    facts = FACTS.get((kind, connector.name), UNKNOWN)
    pushes = connector.name == "BatonConnector" and kind != "torch" and connector.extra.get("contract") == "layerwise"
    return replace(facts, contract="layerwise") if pushes else facts


def reserved(deployment: Deployment, address: str, port: int) -> str:
    """Why nothing of ours should listen there; empty: it may."""
    facts = facts_of(deployment)
    node = next((node for node in deployment.node if node.address == address), None)
    if not facts.ascend_transfer and facts.contract != "mooncake":
        return ""
    if port in MOONCAKE_PORTS:
        return f"Mooncake takes ports of {MOONCAKE_PORTS[0]}-{MOONCAKE_PORTS[-1]} at random"
    if facts.ascend_transfer and node and node.hardware in ("A2", "A3") and port in adxl_ports(node.devices):
        ports = adxl_ports(node.devices)
        return f"ADXL listens on {ports[0]}-{ports[-1]} of a node with {node.devices} chips"
    return ""


@dataclass(slots=True)
class Ledger:
    """Filled in two passes: what the file fixes, then what is chosen around it."""

    deployment: Deployment
    conflicts: list[Conflict] = field(default_factory=list)
    _ports: dict[str, dict[int, str]] = field(default_factory=dict)
    _devices: dict[str, dict[int, str]] = field(default_factory=dict)
    _said: set[tuple[str, str]] = field(default_factory=set)

    def fix_port(self, node: str, port: int, owner: str, key: str) -> None:
        taken = self._ports.setdefault(node, {})
        if port > 65535:
            self._refuse_port(key, port, f"{owner} on {node} goes beyond 65535")
        elif port in taken:
            others = f"{owner} and {taken[port]}"
            self._refuse_port(key, port, f"{others} would both listen on port {port} of {node}", f"{others} {node}")
        elif reason := reserved(self.deployment, node, port):
            self._refuse_port(key, port, f"{owner}: {reason}")
        taken[port] = owner

    def _refuse_port(self, key: str, port: int, reason: str, once: str = "") -> None:
        """Of ports in a row only the first."""
        if (key, once or reason) not in self._said:
            self._said.add((key, once or reason))
            self._refuse(key, port, reason, "give it another")

    def choose_ports(self, nodes: Iterable[str], start: int, num: int, owner: str, key: str) -> int:
        """The first of `num` ports in a row, from `start` on, that are free on all of the nodes."""
        nodes, first = list(nodes), start
        while first + num <= 65536:
            busy = next((port for port in range(first + num - 1, first - 1, -1) if self._is_busy(nodes, port)), None)
            if busy is None:
                for node in nodes:
                    self._ports.setdefault(node, {}).update(dict.fromkeys(range(first, first + num), owner))
                return first
            first = busy + 1
        where = ", ".join(nodes)
        self._refuse(key, start, f"{owner} needs {num} free ports in a row from there on {where}", "begin lower")
        return start

    def _is_busy(self, nodes: list[str], port: int) -> bool:
        return any(port in self._ports.get(node, {}) or reserved(self.deployment, node, port) for node in nodes)

    def fix_devices(self, addresses: Iterable[str], devices: Iterable[int], owner: str, key: str) -> None:
        devices = list(devices)
        for address in addresses:
            taken, node = self._devices.setdefault(address, {}), self._node(address)
            for other in dict.fromkeys(taken[device] for device in devices if device in taken):
                theirs = [device for device in devices if taken.get(device) == other]
                belong = "device {} of {} belongs" if len(theirs) == 1 else "devices {} of {} belong"
                listed = ", ".join(map(str, theirs))
                reason = f"{belong.format(listed, address)} to {other} already"
                self._refuse(key, devices, reason, "give each device to one instance")
            if node and any(device >= node.devices for device in devices):
                reason = f"{address} has devices 0 to {node.devices - 1}"
                self._refuse(key, devices, reason, "count from 0, or correct node.devices")
            taken.update(dict.fromkeys(devices, owner))

    def choose_devices(self, address: str, num: int, owner: str, key: str) -> tuple[int, ...]:
        """The first free ones; fewer than `num`, and a conflict, if there are no more."""
        taken, node = self._devices.setdefault(address, {}), self._node(address)
        free = [device for device in range(node.devices if node else num) if device not in taken][:num]
        if node and len(free) < num:
            reason = f"{owner} needs {num} devices there; {len(free)} of its {node.devices} are free"
            self._refuse(key, address, reason, "lower tp, pp or dp, add a node, or correct node.devices")
        taken.update(dict.fromkeys(free, owner))
        return tuple(free)

    def _node(self, address: str) -> Node | None:
        return next((node for node in self.deployment.node if node.address == address), None)

    def _refuse(self, key: str, value: object, reason: str, remedy: str) -> None:
        self.conflicts.append(Conflict(key, str(value), reason, remedy))

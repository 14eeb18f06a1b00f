"""Who exists: the instances of each role, and whether an operator wants them used. `membership.py` changes it."""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import math
from collections import Counter

from proxy.config import Address, ProxyConfig
from proxy.health import Health
from proxy.load_board import BoardRow, SharedLoad
from proxy.load_ledger import InstanceLoad, settle_speeds
from proxy.upstream_pool import UpstreamPool

# One backend under three names to the seeds' proxy (ascend-proxy.md 2.1, "Server key"), so a command that adds one
# and removes another goes on working.
_THIS_HOST = frozenset({"localhost", "0.0.0.0"})


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Role:
        return Role.DECODE if self is Role.PREFILL else Role.PREFILL


class Source(enum.StrEnum):
    """Who brought an instance in. Only that one, or an operator, takes it out."""

    CONFIG = "config"
    ADMIN = "admin"
    LEASE = "lease"
    KUBERNETES = "kubernetes"


def canonical(address: Address) -> Address:
    """One spelling for addresses that mean the same."""
    host = address.host.lower()
    if host in _THIS_HOST:
        return Address("127.0.0.1", address.port)
    try:
        return Address(ipaddress.ip_address(host).compressed, address.port)
    except ValueError:
        return Address(host, address.port)


class Instance:
    """One engine behind one address. `enabled` is the operator's word, `health` is evidence.

    `name` is what the address was resolved from, where a host name stands for several instances, else the address.
    """

    __slots__ = (
        "address",
        "drain_by",
        "enabled",
        "failures",
        "health",
        "key",
        "load",
        "name",
        "num_probes",
        "num_waiting",
        "pool",
        "role",
        "source",
    )

    def __init__(
        self,
        role: Role,
        address: Address,
        config: ProxyConfig,
        loop: asyncio.AbstractEventLoop,
        source: Source = Source.CONFIG,
        name: Address | None = None,
        load: InstanceLoad | None = None,
    ) -> None:
        self.role = role
        self.address = address
        self.name = name or address
        self.key = str(address)
        self.source = source
        self.enabled = True
        self.drain_by = math.inf
        self.num_probes = 0
        self.num_waiting: int | None = None
        """Requests in the engine's own queue, when it was last read; None where it doesn't say."""
        self.health = Health(config.health_max_failures, config.health_max_request_failures)
        self.load = load or InstanceLoad()
        self.failures: Counter[str] = Counter()
        self.pool = UpstreamPool(address, config, loop)
        if name is not None:  # a server that tells virtual hosts apart knows itself by its name
            named = UpstreamPool(name, config, loop)
            self.pool.host_line, self.pool.server_name = named.host_line, named.server_name

    @property
    def num_open(self) -> int:
        """Requests it is working on, those included that nobody waits for any more; probes of ours are none."""
        return max(self.load.num_requests, len(self.pool.active) - self.num_probes)

    def close(self) -> None:
        self.pool.close()
        self.load.leave()

    def __repr__(self) -> str:
        return f"<Instance {self.role.value} {self.key} enabled={self.enabled} healthy={self.health.healthy}>"


class Fleet:
    """The members. The tuples are replaced, never changed, so whoever holds one sees one consistent set.

    `board` is there where several worker processes share the loads."""

    def __init__(self, config: ProxyConfig, loop: asyncio.AbstractEventLoop, board: BoardRow | None = None) -> None:
        self._config = config
        self._loop = loop
        self.board = board
        self.members: dict[Role, tuple[Instance, ...]] = {
            Role.PREFILL: tuple(self.create(Role.PREFILL, one, Source.CONFIG) for one in config.prefillers),
            Role.DECODE: tuple(self.create(Role.DECODE, one, Source.CONFIG) for one in config.decoders),
        }
        self._num_picks = 0

    @property
    def all(self) -> tuple[Instance, ...]:
        return self.members[Role.PREFILL] + self.members[Role.DECODE]

    def find(self, role: Role, address: Address) -> Instance | None:
        wanted = canonical(address)
        return next((one for one in self.members[role] if canonical(one.address) == wanted), None)

    def named(self, role: Role, name: Address) -> list[Instance]:
        """Those at the address `name`, or that it was resolved to."""
        wanted = canonical(name)
        return [one for one in self.members[role] if wanted in (canonical(one.address), canonical(one.name))]

    def picked(self, instance: Instance) -> None:
        if self.board is not None and isinstance(instance.load, SharedLoad):
            instance.load.picked()
            return
        self._num_picks += 1
        instance.load.last_pick = self._num_picks

    def create(self, role: Role, address: Address, source: Source, name: Address | None = None) -> Instance:
        """An instance that is not a member yet."""
        board, key = self.board, str(canonical(address))
        load = board.load_of(role.value, key, str(address)) if board is not None else InstanceLoad()
        load.on_measured = lambda: self.settle_speeds(role)
        return Instance(role, address, self._config, self._loop, source, name, load)

    def settle_speeds(self, role: Role, drift: float = 0.0) -> None:
        settle_speeds((one.load for one in self.members[role]), drift)

    def admit(self, instance: Instance) -> None:
        self.members = {**self.members, instance.role: (*self.members[instance.role], instance)}

    def drop(self, instance: Instance) -> None:
        """It leaves; what is still open on it is cut off."""
        rest = tuple(one for one in self.members[instance.role] if one is not instance)
        self.members = {**self.members, instance.role: rest}
        instance.close()

"""Who exists: the instances of each role, whether an operator wants them used, and how they are added and drained."""

from __future__ import annotations

import asyncio
import enum

from proxy.config import Address, ProxyConfig
from proxy.health import Health
from proxy.load_ledger import InstanceLoad
from proxy.upstream_pool import UpstreamPool


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Instance:
    """One engine behind one address. `enabled` is the operator's word, `health` is evidence."""

    __slots__ = ("address", "enabled", "health", "key", "load", "pool", "role")

    def __init__(self, role: Role, address: Address, config: ProxyConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.role = role
        self.address = address
        self.key = str(address)
        self.enabled = True
        self.health = Health(config.health_max_failures, config.health_max_request_failures)
        self.load = InstanceLoad()
        self.pool = UpstreamPool(address, config, loop)

    def __repr__(self) -> str:
        return f"<Instance {self.role.value} {self.key} enabled={self.enabled} healthy={self.health.healthy}>"


class Fleet:
    """The membership. The tuples are replaced, never changed, so whoever holds one sees one consistent set."""

    def __init__(self, config: ProxyConfig, loop: asyncio.AbstractEventLoop) -> None:
        self._config = config
        self._loop = loop
        self.members: dict[Role, tuple[Instance, ...]] = {
            Role.PREFILL: tuple(Instance(Role.PREFILL, one, config, loop) for one in config.prefillers),
            Role.DECODE: tuple(Instance(Role.DECODE, one, config, loop) for one in config.decoders),
        }
        self._num_picks = 0

    @property
    def all(self) -> tuple[Instance, ...]:
        return self.members[Role.PREFILL] + self.members[Role.DECODE]

    def find(self, role: Role, address: Address) -> Instance | None:
        return next((one for one in self.members[role] if one.address == address), None)

    def picked(self, instance: Instance) -> None:
        self._num_picks += 1
        instance.load.last_pick = self._num_picks

    def create(self, role: Role, address: Address) -> Instance:
        """An instance that is not a member yet."""
        return Instance(role, address, self._config, self._loop)

    def admit(self, instance: Instance) -> None:
        self.members = {**self.members, instance.role: (*self.members[instance.role], instance)}

    def drop_drained(self) -> list[Instance]:
        """Disabled instances with nothing open leave. Returns them."""
        gone = [one for one in self.all if not one.enabled and not one.load.num_requests and not one.pool.active]
        for instance in gone:
            rest = tuple(one for one in self.members[instance.role] if one is not instance)
            self.members = {**self.members, instance.role: rest}
            instance.pool.close()
        return gone

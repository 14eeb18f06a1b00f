"""Who joins and who leaves: operators, leases, DNS and discovery ask here, and time does the rest.

An instance that is added joins once it answers; one that is removed takes no new work, ends what it has, serves the KV
it handed out, and is gone then or at its deadline (`instance_state.py`). Every instance has one source: only that one,
or an operator, takes it out. What an operator took out stays out until an operator, or nobody, wants it any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from proxy.capacity import CapacityReader
from proxy.config import Address, ProxyConfig
from proxy.errors import ProxyError
from proxy.health_probe import Prober
from proxy.instance import Fleet, Instance, Role, Source, canonical
from proxy.instance_state import InstanceState, state_of
from proxy.kv_ledger import KvLedger

log = logging.getLogger(__name__)

MAX_INSTANCES = 4096  # members and waiting ones: every one is probed
SOURCE_RETRY_S = 1.0  # between probes of an instance whose source says that it exists: it is only just starting

Key = tuple[Role, Address]


@dataclass(slots=True, eq=False)
class Waiting:
    """An instance that was added and has not answered yet."""

    instance: Instance
    task: asyncio.Task[None] | None = None
    num_probes: int = 0
    last_error: str = ""


@dataclass(slots=True)
class Lease:
    ttl_s: float
    expires: float


class Membership:
    def __init__(
        self,
        config: ProxyConfig,
        fleet: Fleet,
        ledger: KvLedger,
        prober: Prober,
        capacity: CapacityReader,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._prober = prober
        self._capacity = capacity
        self._loop = loop
        self.waiting: dict[Key, Waiting] = {}
        self.leases: dict[Key, Lease] = {}
        self._barred: dict[Key, float] = {}  # until when nobody but an operator may bring it back
        self._moved: dict[Key, Role] = {}  # given another role: its source goes on naming the old one
        self.becoming: dict[Instance, Role] = {}
        self._to_replace: set[Key] = set()  # leave once another of their role has joined

    # --- joining

    def add(
        self,
        role: Role,
        address: Address,
        source: Source = Source.ADMIN,
        *,
        name: Address | None = None,
        at_once: bool = False,
    ) -> None:
        """Let it join when it answers, or `at_once`. Does no harm if it is there; takes back one that is leaving."""
        key = (role, canonical(address))
        if source is Source.ADMIN:
            self._barred.pop(key, None)
            self._moved.pop(key, None)
            self._forget_becoming(key)
        else:
            key = (self._moved.get(key, role), key[1])
            if key in self._barred or self._is_becoming(key):
                return
        self._to_replace.discard(key)
        known = self._fleet.find(key[0], address)
        waiting = self.waiting.get(key)
        if source is Source.ADMIN and (known or waiting):
            (known or waiting.instance).source = source  # type: ignore[union-attr]
        if known is not None:
            self._take_back(known)
        elif waiting is None:
            if len(self._fleet.all) + len(self.waiting) >= MAX_INSTANCES:
                raise ProxyError(409, f"There are {MAX_INSTANCES} instances already; remove some first.")
            self._begin(key, address, source, name, at_once)

    def _is_becoming(self, key: Key) -> bool:
        return any((role, canonical(one.address)) == key for one, role in self.becoming.items())

    def _forget_becoming(self, key: Key) -> Instance | None:
        """Of an instance that has left in one role and has not begun in the other: another worker still has it."""
        for one in self.becoming:
            if (one.role, canonical(one.address)) == key and one not in self._fleet.all:
                del self.becoming[one]
                return one
        return None

    def _begin(self, key: Key, address: Address, source: Source, name: Address | None, at_once: bool) -> None:
        instance = self._fleet.create(key[0], address, source, name)
        if at_once:
            self._admit(instance)
            return
        waiting = self.waiting[key] = Waiting(instance)
        waiting.task = self._loop.create_task(self._join(key, waiting))

    async def _join(self, key: Key, waiting: Waiting) -> None:
        """Ask until it answers. What an operator added is given up in the end; others may take their time."""
        instance, config = waiting.instance, self._config
        try:
            for waiting.num_probes in itertools.count(1):
                waiting.last_error = await self._prober.serves(instance)
                if not waiting.last_error:
                    self._admit(instance)
                    return
                by_hand = instance.source is Source.ADMIN
                if by_hand and waiting.num_probes >= config.max_waiting_retries:
                    log.warning(
                        "event=instance_dropped role=%s instance=%s reason=%r",
                        instance.role.value, instance.key, f"not ready in time: {waiting.last_error}",
                    )  # fmt: skip
                    return
                await asyncio.sleep(config.waiting_retry_interval if by_hand else SOURCE_RETRY_S)
        finally:
            if self.waiting.get(key) is waiting:
                del self.waiting[key]
            if self._fleet.find(key[0], instance.address) is not instance:
                instance.close()

    def _admit(self, instance: Instance) -> None:
        self._fleet.admit(instance)
        self._prober.follow()
        self._capacity.read_soon(instance)
        log.info(
            "event=instance_added role=%s instance=%s source=%s",
            instance.role.value, instance.key, instance.source.value,
        )  # fmt: skip
        self._remove_replaced(instance.role)

    def _take_back(self, instance: Instance) -> None:
        self.becoming.pop(instance, None)
        instance.drain_by = math.inf
        if not instance.enabled:
            instance.enabled = True
            log.info("event=instance_taken_back role=%s instance=%s", instance.role.value, instance.key)

    # --- leaving

    def remove(self, role: Role, address: Address, source: Source = Source.ADMIN, timeout_s: float = 0) -> None:
        """No new work from now on. Harmless for one that waits, leaves already or was never there.

        An operator may name the host name that stands for several. `timeout_s` of 0 is the configured deadline."""
        key = (role, canonical(address))
        if source is not Source.ADMIN:
            key = (self._moved.pop(key, role), key[1])
        by_hand = source is Source.ADMIN
        for waiting_key, waiting in list(self.waiting.items()):
            one = waiting.instance
            if waiting_key[0] is key[0] and key[1] in (waiting_key[1], canonical(one.name)):
                if by_hand or one.source is source:
                    self._stop_waiting(waiting_key)
                if by_hand:
                    self._bar(waiting_key, one)
        for known in self._fleet.named(key[0], address):
            if by_hand:
                self._bar((known.role, canonical(known.address)), known)
            if by_hand or known.source is source:
                self.drain(known, timeout_s)
        self.leases.pop(key, None)
        self.tick(monotonic())

    def replace(self, role: Role, leaving: Sequence[Address], joining: Sequence[Address]) -> int:
        """What the configuration file says now. Where nobody else is left, those who leave serve on until another has
        joined: to change a whole list is no outage. Returns how many could be added."""
        num_added = 0
        for address in joining:
            try:
                self.add(role, address, Source.CONFIG)
                num_added += 1
            except ProxyError as error:
                log.error("event=reload_incomplete role=%s instance=%s reason=%r", role.value, address, error.message)
        self._to_replace.update((role, canonical(address)) for address in leaving)
        self._remove_replaced(role)
        return num_added

    def _remove_replaced(self, role: Role) -> None:
        leaving = [key for key in self._to_replace if key[0] is role]
        if not leaving:
            return
        stays = any(
            one.enabled and (role, canonical(one.address)) not in leaving and (role, canonical(one.name)) not in leaving
            for one in self._fleet.members[role]
        )
        if stays or not any(key[0] is role for key in self.waiting):
            self._to_replace.difference_update(leaving)
            for _, address in leaving:
                self.remove(role, address, Source.CONFIG)

    def _stop_waiting(self, key: Key) -> None:
        waiting = self.waiting.pop(key)
        if waiting.task is not None:
            waiting.task.cancel()

    def _bar(self, key: Key, instance: Instance) -> None:
        """Its source may go on naming it. One with a lease is let in again when it has been silent for a lease."""
        if instance.source is Source.LEASE:
            lease = self.leases.get(key)
            self._barred[key] = monotonic() + (lease.ttl_s if lease else 0)
        elif instance.source is Source.KUBERNETES:
            self._barred[key] = math.inf

    def forget(self, role: Role, address: Address) -> None:
        """Its source has it no more: what comes at this address later is another, which no operator took out."""
        self._barred.pop((role, canonical(address)), None)

    def drain(self, instance: Instance, timeout_s: float = 0) -> None:
        """No new work for this member; a role that it was to have next is forgotten."""
        self.becoming.pop(instance, None)
        if instance.enabled:
            instance.enabled = False
            instance.drain_by = monotonic() + (timeout_s or self._config.instance_drain_timeout_s)
            log.info(
                "event=instance_draining role=%s instance=%s requests=%d",
                instance.role.value, instance.key, instance.num_open,
            )  # fmt: skip
        elif timeout_s:
            instance.drain_by = monotonic() + timeout_s

    def change_role(self, role: Role, address: Address) -> None:
        """Drain it in the other role; then it joins in `role`. Raises ProxyError if nobody knows it."""
        here, there = (role, canonical(address)), (role.other, canonical(address))
        if (back := self._forget_becoming(here)) is not None:
            self._begin(here, address, back.source, None, False)
            return
        waiting, known = self.waiting.get(there), self._fleet.find(role.other, address)
        if known is None and waiting is None:
            if self._fleet.find(role, address) is None and here not in self.waiting:
                raise ProxyError(404, f"There is no instance {address}.", error_type="NotFoundError")
            return
        one = known or waiting.instance  # type: ignore[union-attr]
        if one.source not in (Source.ADMIN, Source.CONFIG):
            self._moved.pop(here, None)
            self._moved[there] = role
        if there in self.leases:
            self.leases[here] = self.leases.pop(there)
        self._barred.pop(here, None)
        if waiting is not None:
            self._stop_waiting(there)
            self._begin(here, address, one.source, None, False)
        elif known is not None:
            self.drain(known)
            self.becoming[known] = role
            self.tick(monotonic())

    # --- leases

    def register(self, role: Role, address: Address, ttl_s: float, now: float) -> Role:
        """Join, or renew. Returns the role it has: an operator may have changed it. Raises ProxyError."""
        key = (role, canonical(address))
        if key in self._barred:
            self._barred[key] = now + ttl_s
            raise ProxyError(
                409, f"{address} was removed by an operator; POST /instances/add brings it back.",
                error_type="conflict_error",
            )  # fmt: skip
        self.add(role, address, Source.LEASE)
        key = (self._moved.get(key, role), key[1])
        self.leases[key] = Lease(ttl_s, now + ttl_s)
        return key[0]

    def deregister(self, role: Role, address: Address) -> bool:
        """The instance leaves of its own will. Returns whether it had a lease."""
        key = (role, canonical(address))
        held = (self._moved.get(key, role), key[1]) in self.leases
        if held:
            self.remove(role, address, Source.LEASE)
        return held

    # --- for another worker process

    def memory(self) -> list[list[list[Any]]]:
        """What is remembered beside the members: who is barred until when (None: for good), who moved, who leaves as
        soon as there is another."""
        barred = [[*_plain(key), None if until == math.inf else until] for key, until in self._barred.items()]
        moved = [[*_plain(key), to.value] for key, to in self._moved.items()]
        return [barred, moved, [_plain(key) for key in self._to_replace]]

    def remember(self, memory: list[list[list[Any]]]) -> None:
        barred, moved, to_replace = memory
        self._barred = {_key(*key): math.inf if until is None else until for *key, until in barred}
        self._moved = {_key(*key): Role(to) for *key, to in moved}
        self._to_replace = {_key(*key) for key in to_replace}

    # --- time

    def tick(self, now: float) -> None:
        """Called now and then, and after every removal."""
        for (role, address), lease in list(self.leases.items()):
            if lease.expires <= now:
                log.warning("event=lease_expired role=%s instance=%s ttl_s=%g", role.value, address, lease.ttl_s)
                del self.leases[role, address]
                self._moved = {key: to for key, to in self._moved.items() if (to, key[1]) != (role, address)}
                self.remove(role, address, Source.LEASE)
        self._barred = {key: until for key, until in self._barred.items() if until > now}
        leaving = [one for one in self._fleet.all if not one.enabled]
        if leaving:
            held = self.kv_held()
            for one in leaving:
                if self.state(one, held, now) is InstanceState.GONE:
                    self._let_go(one, late=now >= one.drain_by)
        for one in [one for one in self.becoming if one not in self._fleet.all]:
            self._become(one)

    def _let_go(self, instance: Instance, late: bool) -> None:
        log.log(
            logging.WARNING if late else logging.INFO,
            "event=instance_removed role=%s instance=%s drained=%s requests=%d",
            instance.role.value, instance.key, not late, instance.num_open,
        )  # fmt: skip
        self._fleet.drop(instance)
        self._prober.follow()
        if instance in self.becoming:
            self._become(instance)

    def _become(self, instance: Instance) -> None:
        """It has left in its old role here: it begins in the other once all workers have let it go."""
        if instance.load.is_used_elsewhere():
            return
        role = self.becoming.pop(instance)
        key = (role, canonical(instance.address))
        if self._fleet.find(role, instance.address) is None and key not in self.waiting:
            self._begin(key, instance.address, instance.source, None, False)

    def kv_held(self) -> Counter[str]:
        """By the key of a prefiller: hand-outs that a decoder may still come for."""
        return Counter(entry.prefiller for entry in self._ledger.open)

    def state(self, instance: Instance, held: Counter[str], now: float) -> InstanceState:
        return state_of(
            enabled=instance.enabled,
            num_open=instance.num_open,
            num_kv_held=held[instance.key] if instance.role is Role.PREFILL else 0,
            overdue=now >= instance.drain_by,
        )

    def stop(self) -> None:
        for key in list(self.waiting):
            self._stop_waiting(key)


def _plain(key: Key) -> list[Any]:
    role, address = key
    return [role.value, *address]


def _key(role: str, host: str, port: int) -> Key:
    return Role(role), Address(host, port)

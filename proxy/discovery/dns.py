"""Host names of instances, looked up again and again: what a name stands for may change while the proxy runs.

A name with one address stays one instance under its name; when the address changes, its idle connections are closed,
so that new ones go to the new address. A name with several addresses (a headless service, round-robin DNS) is one
instance for each; they come and go with the records. IPv4 addresses are used where a name has any, else IPv6: a host
with both is one instance. A look-up that fails changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable

from proxy.config import Address
from proxy.errors import ProxyError
from proxy.instance import Fleet, Instance, Role, Source, canonical
from proxy.membership import Membership

log = logging.getLogger(__name__)

LOOK_UP_TIMEOUT_S = 10.0

Resolve = Callable[[str], Awaitable[frozenset[str]]]
Name = tuple[Role, Address]


def is_name(address: Address) -> bool:
    try:
        ipaddress.ip_address(canonical(address).host)
    except ValueError:
        return True
    return False


async def look_up(host: str) -> frozenset[str]:
    """Its addresses, by the system's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    ipv4 = frozenset(str(one[4][0]) for one in found if one[0] == socket.AF_INET)
    return ipv4 or frozenset(str(one[4][0]) for one in found if one[0] == socket.AF_INET6)


class NameWatcher:
    """Follows the names of the members (and of those that wait to be); whoever adds one by its name need not say so."""

    def __init__(
        self,
        fleet: Fleet,
        membership: Membership,
        interval_s: float,
        loop: asyncio.AbstractEventLoop,
        resolve: Resolve = look_up,
    ) -> None:
        self._fleet = fleet
        self._membership = membership
        self._interval_s = interval_s
        self._loop = loop
        self._resolve = resolve
        self._last: dict[Name, frozenset[str]] = {}
        self._failing: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._interval_s:
            self._task = self._loop.create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(self._interval_s)

    async def refresh(self) -> None:
        """Look all names up once, and let the membership follow."""
        members = [one for one in self._fleet.all if one.enabled]
        waiting = [one.instance for one in self._membership.waiting.values()]
        names = {(one.role, one.name): one.source for one in [*members, *waiting] if is_name(one.name)}
        self._last = {name: found for name, found in self._last.items() if name in names}
        hosts = {name.host for _, name in names}
        answers = dict(zip(hosts, await asyncio.gather(*map(self._look_up, hosts)), strict=True))
        for (role, name), source in names.items():
            found = answers[name.host]
            if found:
                self._follow(role, name, source, found)
                self._last[role, name] = found

    async def _look_up(self, host: str) -> frozenset[str]:
        """Nothing where the look-up fails: the last answer holds."""
        try:
            async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                found = await self._resolve(host)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            if host not in self._failing:  # once, not every time
                log.warning("event=dns_failed host=%s reason=%r", host, str(error) or "no answer in time")
            self._failing.add(host)
            return frozenset()
        self._failing.discard(host)
        return found

    def _follow(self, role: Role, name: Address, source: Source, found: frozenset[str]) -> None:
        last = self._last.get((role, name), frozenset())
        if found == last:
            return
        under_name = self._fleet.find(role, name)
        if len(found) == 1 and under_name is not None and under_name.enabled:
            if last:
                log.info("event=dns_changed host=%s addresses=%s", name.host, ",".join(found))
                under_name.pool.close(idle_only=True)
            return
        log.info("event=dns_changed host=%s addresses=%s", name.host, ",".join(sorted(found)))
        try:
            self._replace(role, name, source, under_name, found, last)
        except ProxyError as error:  # too many instances
            log.warning("event=dns_ignored host=%s reason=%r", name.host, error.message)

    def _replace(
        self,
        role: Role,
        name: Address,
        source: Source,
        under_name: Instance | None,
        found: frozenset[str],
        last: frozenset[str],
    ) -> None:
        takes_over = under_name is not None and under_name.enabled  # they are the ones that were reached by the name
        known = frozenset[str]() if takes_over else last
        if not takes_over and len(found) == 1 and not last:
            return  # one that waits under its name goes on doing so
        for host in sorted(found - known):
            self._membership.add(role, Address(host, name.port), source, name=name, at_once=takes_over)
        if takes_over and under_name is not None:
            self._membership.drain(under_name)
        for host in known - found:
            self._membership.remove(role, Address(host, name.port), source)

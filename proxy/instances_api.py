"""The `/instances` routes: who is a member, in which state, and the verbs that change it.

Bodies and reply keys of `add` and `remove` are the seeds' (ascend-proxy.md 2.1, Endpoints).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from aiohttp import web

from proxy.admission import Admission
from proxy.auto_contract import ContractFinder
from proxy.config import Address
from proxy.control_http import json_answer, json_object
from proxy.drain import wait_until
from proxy.errors import BadRequest
from proxy.instance import Fleet, Instance, Role, canonical
from proxy.instance_state import InstanceState
from proxy.kv_ledger import KvLedger, KvState
from proxy.membership import Membership
from proxy.reclaim import Reclaimer
from proxy.workers.crew import Crew

Fields = dict[str, Any]
Verb = Callable[[Fields], Awaitable[Fields]]
MAX_SECONDS = 86400.0
_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/\[\]@?#%]+)):(?P<port>[0-9]{1,5})")


def parse_address(text: str) -> Address:
    """`host:port` or `[v6]:port`. Raises BadRequest."""
    bare = text.strip()
    match = _ADDRESS.fullmatch(bare)
    if match and 0 < int(match["port"]) < 65536 and (match["v6"] is None or _is_ipv6(match["v6"])):
        return Address(match["v6"] or match["host"], int(match["port"]))
    nearest = ""
    if (inner := re.fullmatch(r"https?://([^/]+)/*", bare)) and _ADDRESS.fullmatch(inner[1]):
        nearest = f"; did you mean {inner[1]}?"
    elif bare.count(":") > 1 and (v6 := re.fullmatch(r"([0-9A-Fa-f:]+):([0-9]+)", bare)):
        nearest = f"; did you mean [{v6[1]}]:{v6[2]}?"
    raise BadRequest(f"'{text}' is not host:port (IPv6 as [address]:port){nearest}.", "instances")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


class InstancesApi:
    def __init__(
        self,
        fleet: Fleet,
        membership: Membership,
        ledger: KvLedger,
        reclaimer: Reclaimer,
        admission: Admission,
        num_in_flight: Callable[[], int],
        contract_finder: ContractFinder,
        crew: Crew | None = None,
    ) -> None:
        self._fleet = fleet
        self._membership = membership
        self._ledger = ledger
        self._reclaimer = reclaimer
        self._admission = admission
        self._num_in_flight = num_in_flight
        self._contract_finder = contract_finder
        self._crew = crew
        self.verbs: dict[str, Verb] = {
            "add": self._add,
            "remove": self._remove,
            "role": self._role,
            "register": self._register,
            "deregister": self._deregister,
        }
        """What the routes that change something do with the body they are sent. They raise ProxyError."""

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/instances", self.show),
            *(web.post(f"/instances/{verb}", self._changes(verb)) for verb in self.verbs),
            web.delete("/instances/register", self._changes("deregister")),
        ]

    async def show(self, _: web.Request) -> web.Response:
        return json_answer(self.shown() if self._crew is None else await self._crew.instances())

    def shown(self) -> dict[str, Any]:
        """What this process has."""
        ledger, membership = self._ledger, self._membership
        now, held = monotonic(), membership.kv_held()
        return {
            "instances": [self._describe(one, held, now) for one in self._fleet.all],
            "waiting": [
                {
                    "role": one.instance.role.value,
                    "address": one.instance.key,
                    "state": InstanceState.WAITING.value,
                    "source": one.instance.source.value,
                    "num_probes": one.num_probes,
                    "last_error": one.last_error,
                }
                for one in membership.waiting.values()
            ],
            "contract": self._contract_finder.state(),
            "num_in_flight": self._num_in_flight(),
            "num_queued": self._admission.num_waiting,
            "num_reservations": sum(one.load.num_requests for one in self._fleet.all),
            "kv_ledger": {
                "num_entries": len(ledger.open),
                "held": ledger.count(KvState.HELD),
                "reclaiming": ledger.count(KvState.RECLAIMING),
                "totals": {state.value: count for state, count in ledger.totals.items()},
            },
            "num_reclaims_open": self._reclaimer.num_open,
        }

    def _describe(self, one: Instance, held: Counter[str], now: float) -> dict[str, Any]:
        lease = self._membership.leases.get((one.role, canonical(one.address)))
        becoming = self._membership.becoming.get(one)
        return {
            "role": one.role.value,
            "address": one.key,
            "name": str(one.name),
            "source": one.source.value,
            "state": self._membership.state(one, held, now).value,
            "becoming": becoming.value if becoming else None,
            "drain_ends_in_s": None if one.enabled else round(max(0.0, one.drain_by - now), 1),
            "lease_ends_in_s": round(max(0.0, lease.expires - now), 1) if lease else None,
            "enabled": one.enabled,
            "healthy": one.health.healthy,
            "num_failures": one.health.num_failures,
            "num_failed_legs": sum(one.failures.values()),
            "last_error": one.health.last_error,
            "kv_held": held[one.key] if one.role is Role.PREFILL else 0,
            "queue": {"num_open": one.num_open, "num_waiting": one.num_waiting},
            "load": {
                "num_requests": one.load.num_requests,
                "num_tokens": one.load.num_tokens,
                "queue_s": round(one.load.num_tokens / one.load.speed, 4),
                "kv_tokens": one.load.kv_tokens,
                "max_kv_tokens": one.load.max_kv_tokens or None,
                "max_streams": one.load.max_streams or None,
                "speed_tokens_per_s": round(one.load.speed, 1),
                "total_requests": one.load.total_requests,
            },
            "connections": {"active": len(one.pool.active), "idle": len(one.pool.idle)},
        }

    def _changes(self, verb: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def change(request: web.Request) -> web.Response:
            fields = await json_object(request)
            if self._crew is None:
                return json_answer(await self.verbs[verb](fields))
            here = asyncio.ensure_future(self.verbs[verb](fields))
            await asyncio.sleep(0)
            if here.done():
                here.result()  # what is refused here is not tried elsewhere
            wait_s = _seconds(fields, "wait_s", 0.0) if verb == "remove" else 0.0
            answer, others = await asyncio.gather(here, self._crew.everywhere(f"instances/{verb}", fields, wait_s))
            if any(other.get("was_registered") for other in others):
                answer["was_registered"] = True
            return json_answer(answer)

        return change

    async def _add(self, fields: Fields) -> Fields:
        role, addresses = _read(fields)
        for address in addresses:
            self._membership.add(role, address)
        return self._reply(f"Adding {role.value} instances", addresses)

    async def _remove(self, fields: Fields) -> Fields:
        """No new work from now on. `drain_timeout_s` replaces the configured deadline, `wait_s` answers only when they
        are gone, or after so long."""
        role, addresses = _read(fields)
        timeout_s, wait_s = (_seconds(fields, key, 0.0) for key in ("drain_timeout_s", "wait_s"))
        for address in addresses:
            self._membership.remove(role, address, timeout_s=timeout_s)
        if wait_s:
            await wait_until(lambda: not any(self._fleet.named(role, one) for one in addresses), wait_s)
        return self._reply(f"Removing {role.value} instances", addresses)

    async def _role(self, fields: Fields) -> Fields:
        """From now on these are to be `type`: drained in the other role first, then joined in this one."""
        role, addresses = _read(fields)
        for address in addresses:
            self._membership.change_role(role, address)
        return self._reply(f"Making {role.value} instances of", addresses)

    async def _register(self, fields: Fields) -> Fields:
        """The instance's own call: again before `ttl_s` is over, or it is drained."""
        role, (address,) = _read(fields, "instance")
        ttl_s = _seconds(fields, "ttl_s", None)
        has = self._membership.register(role, address, ttl_s, monotonic())
        joined = self._fleet.find(has, address) is not None
        return {"type": has.value, "instance": str(address), "ttl_s": ttl_s, "joined": joined}

    async def _deregister(self, fields: Fields) -> Fields:
        role, (address,) = _read(fields, "instance")
        return {"instance": str(address), "was_registered": self._membership.deregister(role, address)}

    def _reply(self, message: str, addresses: list[Address]) -> Fields:
        members = self._fleet.members
        return {
            "message": f"{message}: {', '.join(map(str, addresses))}.",
            "current_prefill_instances": [one.key for one in members[Role.PREFILL] if one.enabled],
            "current_decode_instances": [one.key for one in members[Role.DECODE] if one.enabled],
        }


def _read(body: Fields, key: str = "instances") -> tuple[Role, list[Address]]:
    """The role and the addresses that a body names; `key` "instance" takes exactly one."""
    try:
        role = Role(str(body.get("type")))
    except ValueError:
        raise BadRequest("'type' must be 'prefill' or 'decode'.", "type") from None
    given = body.get(key)
    texts = [given] if isinstance(given, str) else given
    wants_one = key == "instance"
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"'{key}' must be host:port{'' if wants_one else ' or a list of them'}.", key)
    if wants_one and len(texts) > 1:
        raise BadRequest("'instance' must be one host:port.", key)
    return role, [parse_address(text) for text in texts]


def _seconds(body: dict[str, Any], key: str, default: float | None) -> float:
    """Raises BadRequest. Without a `default` the key must be there."""
    value = body.get(key)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value <= MAX_SECONDS:  # type: ignore[operator]
        raise BadRequest(f"'{key}' must be a number of seconds, more than 0 and at most {MAX_SECONDS:g}.", key)
    return float(value)  # type: ignore[arg-type]

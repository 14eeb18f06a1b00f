"""What a worker that takes a dead one's place must know: who the members are by now, as another worker has them.

Instances are handed over under the names they were given, not those they were resolved to, and pods not at all: the new
worker's own look-ups find them. What drains is left to those who have something open on it.
"""

from __future__ import annotations

from typing import Any

from proxy.config import INSTANCE_KEYS, Address, ProxyConfig
from proxy.errors import ProxyError
from proxy.instance import Fleet, Role, Source, canonical
from proxy.membership import Lease, Membership
from proxy.reload import KEY_KEYS, TLS_KEYS

Json = dict[str, Any]
_FOLLOWED = {*INSTANCE_KEYS, *KEY_KEYS, *TLS_KEYS}  # what a reload may have changed


def taken(read: ProxyConfig, fleet: Fleet, membership: Membership) -> Json:
    """`read` is the configuration as it was read last."""
    waiting = [one.instance for one in membership.waiting.values()]
    there = [one for one in fleet.all if one.enabled and one.source is not Source.KUBERNETES]
    coming = [one for one in waiting if one.source is not Source.KUBERNETES]
    return {
        "read": read.model_dump(mode="json", include=read.model_fields_set & _FOLLOWED),
        "members": _places([(one.role, one.name, one.source) for one in there]),
        "waiting": _places(
            [(one.role, one.name, one.source) for one in coming]
            + [(role, one.name, one.source) for one, role in membership.becoming.items()]
        ),
        "leases": [
            [role.value, *address, lease.ttl_s, lease.expires] for (role, address), lease in membership.leases.items()
        ],
        "memory": membership.memory(),
    }


def _places(found: list[tuple[Role, Address, Source]]) -> list[list[Any]]:
    """Each once: a name may stand for several."""
    return [[role.value, *address, source.value] for role, address, source in dict.fromkeys(found)]


def restore(snapshot: Json, config: ProxyConfig, fleet: Fleet, membership: Membership) -> ProxyConfig:
    """Before anything is served. `config` is what the worker was started with. Returns it as it was read last."""
    there = {}
    for role, host, port, source in snapshot["members"]:
        address = Address(host, port)
        there[Role(role), canonical(address)] = (address, Source(source))
    for one in fleet.all:
        key = (one.role, canonical(one.address))
        if key in there:
            one.source = there.pop(key)[1]
        else:
            fleet.drop(one)
    for (role, _), (address, source) in there.items():
        fleet.admit(fleet.create(role, address, source))
    for role, host, port, source in snapshot["waiting"]:
        try:
            membership.add(Role(role), Address(host, port), Source(source))
        except ProxyError:  # too many: the others have noticed too
            break
    for role, host, port, ttl_s, expires in snapshot["leases"]:
        membership.leases[Role(role), Address(host, port)] = Lease(ttl_s, expires)
    membership.remember(snapshot["memory"])
    fixed = config.model_dump(include=config.model_fields_set - _FOLLOWED)
    return ProxyConfig(**{**fixed, **snapshot["read"]})

"""From where an instance of ours may call: the addresses its requests to us come from."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from aiohttp import web

from proxy.errors import ConfigError
from proxy.instance import Fleet, Instance, Role

ANY = "any"
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Callers:
    """The decoders of the fleet, and what `allowed` names: addresses, networks, or `any`. Raises ConfigError."""

    def __init__(self, allowed: Sequence[str], fleet: Fleet) -> None:
        self._fleet = fleet
        self._are_all = ANY in allowed
        try:
            self._networks = [ipaddress.ip_network(one, strict=False) for one in allowed if one != ANY]
        except ValueError as error:
            raise ConfigError(f"--metaserver-allow: {error}; write an address, a network, or {ANY}") from None

    def include(self, request: web.Request) -> bool:
        transport = request.transport
        peer = transport.get_extra_info("peername") if transport is not None else None
        if not peer:
            return False
        if self._are_all:
            return True
        caller = ip_of(peer[0])
        if caller is None:
            return False
        here = ip_of(transport.get_extra_info("sockname")[0]) if transport is not None else None
        decoders = self._fleet.members[Role.DECODE]
        if any(caller in network for network in self._networks) or any(caller in addresses_of(one) for one in decoders):
            return True
        # a decoder of this machine that calls --advertise-url does so from the address it calls
        return caller == here and any(is_of_this_machine(address) for one in decoders for address in addresses_of(one))


def is_of_this_machine(address: IpAddress) -> bool:
    """Whether a socket can be bound to it."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def addresses_of(instance: Instance) -> set[IpAddress]:
    """Its own, and what its connections lead to, where it goes by a name."""
    found = {ip_of(instance.address.host)}
    for connection in (*instance.pool.active, *instance.pool.idle):
        if connection.transport is not None and (peer := connection.transport.get_extra_info("peername")):
            found.add(ip_of(peer[0]))
    return {one for one in found if one is not None}


def ip_of(text: str) -> IpAddress | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found

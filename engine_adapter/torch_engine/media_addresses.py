"""Which hosts a client may make this engine fetch from. Pure.

A URL in a request is a request of the engine's own: without this check it reaches what the engine can reach and its
clients can't, such as 127.0.0.1, the machines beside it, or a cloud's metadata service at 169.254.169.254.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

_NAT64 = IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = IPv6Network("::/96")


def is_public(address: str) -> bool:
    """True for an address out in the internet. One that carries another inside is judged by both."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv4Address):
        return _is_public_v4(ip)
    inner = _inner(ip)
    if inner is not None:
        return all(map(_is_public_v4, inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_site_local)


def _is_public_v4(ip: IPv4Address) -> bool:
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _inner(ip: IPv6Address) -> tuple[IPv4Address, ...] | None:
    """IPv4 addresses that this one stands for: mapped, compatible, NAT64, 6to4 or Teredo."""
    if ip.ipv4_mapped is not None:
        return (ip.ipv4_mapped,)
    if ip in _NAT64 or ip in _IPV4_COMPATIBLE:
        return (IPv4Address(int(ip) & 0xFFFFFFFF),)
    if ip.sixtofour is not None:
        return (ip.sixtofour,)
    return ip.teredo


def literal_address(host: str) -> str | None:
    """The address, where a URL's host is one; None for a name."""
    try:
        return str(ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        return None


def is_allowed_domain(host: str, allowed: tuple[str, ...]) -> bool:
    """Names are compared whole, as vLLM does; an empty list allows all."""
    name = host.lower().rstrip(".")
    return not allowed or name in {domain.lower().rstrip(".") for domain in allowed}

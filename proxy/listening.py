"""Where the proxy listens: sockets on every address a host name means, and what it calls itself to decoders."""

from __future__ import annotations

import errno
import ipaddress
import socket

from proxy.config import Address, ProxyConfig
from proxy.errors import StartError
from proxy.metaserver import PATH as METASERVER_PATH


def is_loopback(address: Address) -> bool:
    return ipaddress.ip_address(address.host).is_loopback


def metaserver_url(config: ProxyConfig, port: int) -> str:
    scheme = "https" if config.tls_cert else "http"
    base = config.advertise_url.rstrip("/") or f"{scheme}://{Address(config.host.strip('[]'), port)}"
    return base if base.endswith(METASERVER_PATH) else base + METASERVER_PATH


def listening_sockets(host: str, port: int, backlog: int) -> list[socket.socket]:
    """One bound socket for each address `host` means, all on one port. Raises StartError."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"--host {host}: {error.strerror or error}") from None
    sockets: list[socket.socket] = []
    unusable: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:  # an address family this machine lacks
            unusable = error
            continue
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port or (sockets[0].getsockname()[1] if sockets else 0), *address[2:]))
            one.listen(backlog)
            one.setblocking(False)
            sockets.append(one)
        except OSError as error:
            one.close()
            unusable = error
            if error.errno == errno.EADDRNOTAVAIL:
                continue  # localhost may name ::1 where there is no IPv6
            for other in sockets:
                other.close()
            raise StartError(_cannot_listen(host, port, error)) from None
    if not sockets:
        raise StartError(_cannot_listen(host, port, unusable))
    return sockets


def _cannot_listen(host: str, port: int, error: OSError | None) -> str:
    if error is not None and error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what listens there or choose another with --port"
    if error is not None and error.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one above 1023 with --port"
    return f"cannot listen on {host}:{port}: {error.strerror if error else 'no address'}; choose another with --host"

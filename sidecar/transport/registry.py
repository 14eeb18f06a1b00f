"""Which transports there are, best first: one line each in `available_transports`."""

from __future__ import annotations

import logging

from sidecar.config import SidecarConfig
from sidecar.copy_executor import CopyExecutor
from sidecar.lease_board import LeaseBoard
from sidecar.transport import mooncake
from sidecar.transport.contract import Transport
from sidecar.transport.mooncake_process import MooncakeTransport, check_runs
from sidecar.transport.shm import ShmTransport
from sidecar.transport.tcp import TcpTransport

logger = logging.getLogger(__name__)


def available_transports(
    config: SidecarConfig, executor: CopyExecutor, host: str, board: LeaseBoard | None = None
) -> dict[str, Transport]:
    """Those that config and machine allow. Raises StartError if the one asked for cannot be, with what is missing.

    With "auto" Mooncake is looked for but not started: it is when the first peer from another host asks for it. It
    comes before tcp where it reaches devices, and after it where it would only use TCP itself, more slowly.
    """
    if config.transport == "mooncake":
        check_runs(config, host)
        return {"mooncake": MooncakeTransport(config, host)}
    transports: list[Transport] = []
    if config.transport in ("auto", "shm"):
        transports.append(ShmTransport(executor))
    if config.transport in ("auto", "tcp"):
        transports.append(TcpTransport(config, host, board))
    if config.transport == "auto":
        lacking = mooncake.missing()
        if not lacking:
            last = len(transports) - (config.mooncake_protocol != "tcp")
            transports.insert(last, MooncakeTransport(config, host))
        elif config.mooncake_protocol != "tcp":
            logger.warning("mooncake_unavailable between_hosts=tcp reason=%s", lacking)
    return {transport.name: transport for transport in transports}

"""Which transports there are, best first: one line each in `available_transports`."""

from __future__ import annotations

import logging

from sidecar.config import SidecarConfig
from sidecar.copy_executor import CopyExecutor
from sidecar.transport import mooncake
from sidecar.transport.contract import Transport
from sidecar.transport.mooncake_process import MooncakeTransport, check_runs
from sidecar.transport.shm import ShmTransport

logger = logging.getLogger(__name__)


def available_transports(config: SidecarConfig, executor: CopyExecutor, host: str) -> dict[str, Transport]:
    """Those that config and machine allow. Raises StartError if the one asked for cannot be, with what is missing.

    With "auto" Mooncake is looked for but not started: it is when the first peer from another host asks for it.
    """
    transports: dict[str, Transport] = {}
    if config.transport in ("auto", "shm"):
        transports["shm"] = ShmTransport(executor)
    if config.transport == "mooncake":
        check_runs(config, host)
        transports["mooncake"] = MooncakeTransport(config, host)
    elif config.transport == "auto" and not (lacking := mooncake.missing()):
        transports["mooncake"] = MooncakeTransport(config, host)
    elif config.transport == "auto":
        logger.warning("mooncake_unavailable only_shm=true reason=%s", lacking)
    return transports

"""Which transports there are: one line each."""

from __future__ import annotations

import logging

from sidecar.config import SidecarConfig
from sidecar.copy_executor import CopyExecutor
from sidecar.transport.contract import Transport
from sidecar.transport.shm import ShmTransport

logger = logging.getLogger(__name__)


def available_transports(config: SidecarConfig, executor: CopyExecutor) -> dict[str, Transport]:
    """Those that config and machine allow, best first. Raises StartError if the one asked for cannot be."""
    transports: dict[str, Transport] = {}
    if config.transport in ("auto", "shm"):
        transports["shm"] = ShmTransport(executor)
    return transports

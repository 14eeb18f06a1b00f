"""The sidecar as a thread of the engine's process, for the memory provider in_process; started as OwnSidecar is."""

from __future__ import annotations

import importlib
import logging
import tempfile
from pathlib import Path
from typing import Any

from engine_adapter.sidecar_process import SidecarCommand, SidecarStartError
from sidecar.errors import StartError

logger = logging.getLogger(__name__)

IMPLEMENTATION = "sidecar.in_process"
"""Loaded only here and only when asked for: engines whose sidecar is a process do without its libraries."""


class SidecarThread:
    """See OwnSidecar; a thread is not restarted, it ends with its engine."""

    def __init__(self, command: SidecarCommand, socket_path: str = "") -> None:
        """`socket_path` is made up where empty."""
        self._command = command
        self._directory = tempfile.TemporaryDirectory(prefix="baton-sidecar-")
        self.socket_path = socket_path or str(Path(self._directory.name) / "sidecar.sock")
        self._sidecar: Any = None

    def start(self) -> None:
        """Serve from now on. Raises SidecarStartError."""
        command = self._command
        settings: dict[str, object] = {
            "socket": self.socket_path,
            "listen": command.listen,
            "engine_id": command.engine_id,
            "rank": command.rank,
            "transport": command.transport,
            "metrics_port": command.metrics_port,
            "log_level": command.log_level,
        }
        flags = command.more[::2]  # pairs of a flag and its value, of the settings' names
        settings |= {flag[2:].replace("-", "_"): value for flag, value in zip(flags, command.more[1::2], strict=True)}
        try:
            self._sidecar = importlib.import_module(IMPLEMENTATION).InProcessSidecar(settings)
            line = self._sidecar.start()
        except ImportError as error:
            raise SidecarStartError(f"the sidecar can't be loaded ({error}): install pd-baton[sidecar]") from error
        except StartError as error:
            raise SidecarStartError(f"the sidecar's thread did not start: {error}") from error
        logger.info("sidecar_thread_ready %s", line.removeprefix("ready "))

    def stop(self) -> None:
        """Drain and end the thread, and remove its directory. Idempotent."""
        if self._sidecar is not None:
            self._sidecar.stop()
        self._directory.cleanup()

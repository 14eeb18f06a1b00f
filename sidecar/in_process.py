"""A sidecar as a thread of an engine's process (memory provider in_process): same protocol, same unix socket.

It shares the interpreter's lock with the engine, and ends with it; what copies bytes runs without the lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping

import uvloop
from pydantic import ValidationError

from sidecar.config import SidecarConfig
from sidecar.daemon import Daemon
from sidecar.errors import StartError, UsageError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
"""Draining takes two seconds; a transport may hold the end up for a little longer."""


class InProcessSidecar:
    """One sidecar in one thread with an event loop of its own."""

    def __init__(self, settings: Mapping[str, object]) -> None:
        """`settings` are SidecarConfig's. Raises StartError."""
        try:
            self._config = SidecarConfig.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            raise StartError(f"{first['loc'][0]} {first['input']}: {first['msg']}") from error
        self._ready = threading.Event()
        self._line = ""
        self._failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._daemon: Daemon | None = None
        self._thread = threading.Thread(target=self._run, name="sidecar", daemon=True)

    def start(self) -> str:
        """Serve from now on. Returns the line that says where. Raises StartError."""
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise StartError(f"the sidecar's thread was not ready within {START_TIMEOUT_S:g} s")
        if self._failure is not None:
            raise StartError(str(self._failure)) from self._failure
        return self._line

    def stop(self) -> None:
        """Drain and end. Idempotent."""
        loop, daemon = self._loop, self._daemon
        if loop is not None and daemon is not None and self._thread.is_alive():
            try:
                loop.call_soon_threadsafe(daemon.stop)
            except RuntimeError:  # it has just ended by itself
                return
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except (StartError, UsageError) as error:
            self._failure = error
        except Exception as error:  # the last resort: whoever waits for the start must hear of it
            logger.exception("in_process_sidecar_crashed")
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._daemon = Daemon(self._config)
        await self._daemon.serve(self._say_ready)

    def _say_ready(self, line: str) -> None:
        self._line = line
        self._ready.set()

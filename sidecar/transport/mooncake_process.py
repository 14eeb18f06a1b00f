"""The sidecar's side of Mooncake: one serving process for our pool, one reading process a producer.

A failed Mooncake call is not a stopped one. Whatever goes wrong in a reading process, it is killed and waited for
before any of its copies is reported: that is the fence behind which blocks may be used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys

from sidecar.config import SidecarConfig
from sidecar.connection import FrameConnection
from sidecar.errors import Refusal, StartError
from sidecar.protocol import Message, RegionOpened, decode, encode
from sidecar.registration import Registration
from sidecar.spans import Spans
from sidecar.transport import mooncake
from sidecar.transport.contract import COPIED, STOPPED, PendingCopy, Served
from sidecar.transport.mooncake import CopyEnded, Read, Start, Started, Stop

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 12.0
"""Importing Mooncake and initializing take 0.2 s on a quiet machine; first contact is cut off after this."""
REACH_TIMEOUT_S = 2.0


class EngineProcess:
    """A child that holds one TransferEngine. `failed` resolves, with why, once it is dead and nothing of it writes."""

    def __init__(self, registration: Registration, start: Start) -> None:
        assert registration.fd is not None
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        # The child keeps a duplicate of the engine's connection: should the sidecar be killed, the engine sees the
        # end of it only after this child is dead too.
        kept = (theirs.fileno(), registration.fd, registration.engine_socket)
        quiet = None if logger.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sidecar.transport.mooncake", str(theirs.fileno()), str(os.getpid())],
            pass_fds=kept, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=quiet,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
        theirs.close()
        self.copies: dict[int, MooncakeCopy] = {}
        self.failed: asyncio.Future[str] = loop.create_future()
        self._started: asyncio.Future[Started] = loop.create_future()
        self._why = ""
        self._reaping: asyncio.Task[None] | None = None
        self._connection = FrameConnection(
            ours, max_frame_bytes=mooncake.MAX_FRAME_BYTES, on_frame=self._take, on_closed=self._closed
        )
        self.send(start)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def started(self) -> Started:
        """Wait until it serves, or has reached its peer. Raises Refusal("transport"), with the child dead."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return await asyncio.shield(self._started)
        except TimeoutError as error:
            await self.kill(f"Mooncake was not ready within {START_TIMEOUT_S:g} s")
            raise Refusal("transport", self._why) from error
        except BaseException:
            await self.kill("nobody waits for it any more")
            raise

    def send(self, message: Message) -> None:
        self._connection.send(encode(message))

    async def kill(self, why: str) -> None:
        """When this returns the child is dead and waited for. Idempotent."""
        self._begin_kill(why)
        await asyncio.shield(self.failed)

    def _begin_kill(self, why: str) -> None:
        self._why = self._why or why
        if self._reaping is None:
            self._process.kill()
            self._reaping = asyncio.ensure_future(self._reap())

    async def _reap(self) -> None:
        await asyncio.to_thread(self._process.wait)
        self._connection.close(self._why)
        if not self._started.done():
            self._started.set_exception(Refusal("transport", self._why))
            self._started.exception()
        self.failed.set_result(self._why)
        for copy in list(self.copies.values()):
            copy.fail(self._why)

    def _take(self, frame: bytes) -> None:
        message = decode(mooncake.to_parent, frame)
        if isinstance(message, Started):
            if not self._started.done():
                self._started.set_result(message)
        elif isinstance(message, CopyEnded):
            copy = self.copies.pop(message.copy_id, None)
            if copy is not None:
                copy.end(message.completed)
        else:
            self._begin_kill(message.message)

    def _closed(self, why: str) -> None:
        self._begin_kill("the process of Mooncake's transfer engine died")


class MooncakeCopy(PendingCopy):
    """One copy in a reading process."""

    def __init__(self, process: EngineProcess, copy_id: int, spans: Spans) -> None:
        super().__init__()
        self._process = process
        self._copy_id = copy_id
        process.copies[copy_id] = self
        process.send(Read(copy_id, list(spans)))

    def stop(self) -> None:
        self._process.send(Stop(self._copy_id))

    def end(self, completed: bool) -> None:
        self._finish(COPIED if completed else STOPPED)

    def fail(self, why: str) -> None:
        self._finish(why)


class MooncakeMemory:
    """See contract.PeerMemory."""

    transport = "mooncake"
    checks_marks = False

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._next_copy_id = 1

    @property
    def broken(self) -> str:
        return self._process.failed.result() if self._process.failed.done() else ""

    def read(self, spans: Spans, mark: int = 0) -> PendingCopy:
        if self.broken:
            raise Refusal("transport", self.broken)
        copy_id, self._next_copy_id = self._next_copy_id, self._next_copy_id + 1
        return MooncakeCopy(self._process, copy_id, spans)

    async def close(self) -> None:
        await self._process.kill("its connection to the producer was closed")


class MooncakeTransport:
    """See contract.Transport."""

    name = "mooncake"
    needs_same_host = False

    def __init__(self, config: SidecarConfig, host: str) -> None:
        self._config = config
        self._host = host
        self._serving: dict[str, asyncio.Task[EngineProcess]] = {}
        self._fault = ""

    def registered(self, registration: Registration) -> None:
        """Serve at once where Mooncake is the only way; with "auto" the first peer that needs it waits for it."""
        if self._config.transport == "mooncake":
            task = asyncio.ensure_future(self._start_serving(registration))
            task.add_done_callback(self._first_started)
            self._serving[registration.epoch] = task

    async def serve(self, registration: Registration) -> Served:
        while True:
            if registration.retired:
                raise Refusal("stale_epoch", "the producer's pool is no longer registered")
            task = self._serving.get(registration.epoch)
            if task is None or (task.done() and (task.exception() or task.result().failed.done())):
                task = asyncio.ensure_future(self._start_serving(registration))
                self._serving[registration.epoch] = task
            try:
                process = await asyncio.shield(task)
            except Refusal as refusal:
                self._fault = refusal.message
                raise
            if not process.failed.done():
                started = await process.started()
                return Served(started.session, started.base_address)

    async def open(self, registration: Registration, opened: RegionOpened, fd: int | None) -> MooncakeMemory:
        if fd is not None:
            os.close(fd)
        await _check_reachable(opened.session)
        start = self._start(registration, opened.session, opened.base_address)
        process = EngineProcess(registration, start)
        await process.started()
        return MooncakeMemory(process)

    async def retire(self, registration: Registration) -> None:
        task = self._serving.pop(registration.epoch, None)
        if task is None:
            return
        with contextlib.suppress(Refusal):
            process = await task
            await process.kill("the pool is no longer registered")
        self._fault = ""

    def fault(self) -> str:
        return self._fault

    async def _start_serving(self, registration: Registration) -> EngineProcess:
        process = EngineProcess(registration, self._start(registration))
        await process.started()
        self._fault = ""
        process.failed.add_done_callback(lambda failed: self._serving_died(registration, failed.result()))
        logger.info("mooncake_serving pid=%d epoch=%s", process.pid, registration.epoch)
        return process

    def _first_started(self, task: asyncio.Task[EngineProcess]) -> None:
        if error := task.exception():
            self._fault = str(error)
            logger.error("mooncake_serving_failed error=%s", error)

    def _serving_died(self, registration: Registration, why: str) -> None:
        if not registration.retired:
            self._fault = why
            logger.error("mooncake_serving_died epoch=%s error=%s", registration.epoch, why)

    def _start(self, registration: Registration, session: str = "", remote_address: int = 0) -> Start:
        """Raises Refusal("transport")."""
        if registration.fd is None:
            raise Refusal("transport", "Mooncake runs in a process of its own, which can't map this pool")
        config = self._config
        return Start(
            registration.fd, registration.region.num_bytes, self._host, config.mooncake_protocol,
            config.mooncake_device, session, remote_address, config.copy_bytes_per_s,
        )  # fmt: skip


def check_runs(config: SidecarConfig, host: str) -> None:
    """Start an engine in a child and end it again. Raises StartError with what is missing."""
    if message := mooncake.missing():
        raise StartError(message)
    code = (
        "import os, sys; from sidecar.transport.mooncake import EngineFault, open_engine\n"
        "try: open_engine(*sys.argv[1:])\n"
        "except EngineFault as error: print(error, flush=True); os._exit(3)\n"
        "os._exit(0)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code, host, config.mooncake_protocol, config.mooncake_device],
            capture_output=True, text=True, timeout=START_TIMEOUT_S, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise StartError(f"Mooncake did not start within {START_TIMEOUT_S:g} s") from error
    if tried.returncode != 0:
        raise StartError(tried.stdout.strip() or f"Mooncake's transfer engine died with status {tried.returncode}")


async def _check_reachable(session: str) -> None:
    """A TCP connection of our own first: the engine would hang where this fails at once. Raises Refusal."""
    host, _, port = session.rpartition(":")
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        raise Refusal("transport", f"Mooncake's port at {session} cannot be reached: {error}") from error

"""Both ends on one host: the producer's pool is mapped read-only here and copied once."""

from __future__ import annotations

import asyncio
import errno
import os

from sidecar.copy_executor import CopyExecutor, CopyJob, Moves
from sidecar.errors import Refusal
from sidecar.memory.contract import PoolRegion
from sidecar.protocol import RegionOpened
from sidecar.regions import Region, reopen_read_only, size_of
from sidecar.registration import Registration
from sidecar.spans import Spans
from sidecar.transport.contract import COPIED, STOPPED, PendingCopy, Served


class ShmTransport:
    """See contract.Transport."""

    name = "shm"
    needs_same_host = True

    def __init__(self, executor: CopyExecutor) -> None:
        self._executor = executor

    def registered(self, registration: Registration) -> None:
        """Nothing to begin."""

    async def serve(self, registration: Registration) -> Served:
        if registration.fd is None:
            raise Refusal("transport", "the producer's pool is not shared memory")
        try:
            return Served(fd=reopen_read_only(registration.fd))
        except OSError as error:
            raise Refusal("transport", f"the pool cannot be reopened read-only: {error.strerror}") from error

    async def open(self, registration: Registration, opened: RegionOpened, fd: int | None) -> ShmMemory:
        if not registration.region.on_host:
            if fd is not None:
                os.close(fd)
            raise Refusal("transport", "the consumer's pool is device memory")
        if fd is None:
            raise Refusal("transport", "the producer sent no descriptor of its pool")
        mapping = asyncio.ensure_future(asyncio.to_thread(_map_and_close, fd, opened.num_bytes))
        try:
            remote = await asyncio.shield(mapping)
        except asyncio.CancelledError:
            mapping.add_done_callback(_unmap)
            raise
        except OSError as error:
            raise Refusal("transport", f"the producer's pool cannot be mapped: {error}") from error
        return ShmMemory(registration.region, remote, self._executor)

    async def retire(self, registration: Registration) -> None:
        """Nothing to stop: peers read their own mapping, and are cut off by their connection's end."""

    def fault(self) -> str:
        return ""


def _map_and_close(fd: int, num_bytes: int) -> Region:
    try:
        if size_of(fd) < num_bytes:
            raise OSError(errno.EINVAL, f"it has {size_of(fd)} bytes, not {num_bytes}")
        return Region(fd, num_bytes, writable=False)
    finally:
        os.close(fd)


def _unmap(mapping: asyncio.Future[Region]) -> None:
    """The one who asked has left."""
    if not mapping.cancelled() and mapping.exception() is None:
        mapping.result().close()


class _ShmCopy(PendingCopy):
    def __init__(self, executor: CopyExecutor, moves: Moves) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()

        def on_end(completed: bool) -> None:
            loop.call_soon_threadsafe(self._finish, COPIED if completed else STOPPED)

        self._executor = executor
        self._loop = loop
        self._job: CopyJob = executor.submit(moves, on_end, may_assist=True)
        self._assist()

    def _assist(self) -> None:
        """Copy a chunk here: this thread is awake, and to wake another takes as long. Then what else there is to do."""
        if self._executor.assist(self._job):
            self._loop.call_soon(self._assist)

    def stop(self) -> None:
        self._executor.stop(self._job)


class ShmMemory:
    """See contract.PeerMemory."""

    transport = "shm"

    def __init__(self, local: PoolRegion, remote: Region, executor: CopyExecutor) -> None:
        self._local = local
        self._remote = remote
        self._executor = executor
        self._copies: set[_ShmCopy] = set()

    broken = ""
    checks_marks = False  # the reader sees the board itself

    def read(self, spans: Spans, mark: int = 0) -> PendingCopy:
        moves = Moves(self._local.address, spans.local, self._remote.address, spans.remote, spans.lengths, spans.each)
        copy = _ShmCopy(self._executor, moves)
        self._copies.add(copy)
        copy.ended.add_done_callback(lambda _: self._copies.discard(copy))
        return copy

    async def close(self) -> None:
        copies = list(self._copies)
        for copy in copies:
            copy.stop()
        if copies:
            await asyncio.wait([copy.ended for copy in copies])
        self._remote.close()

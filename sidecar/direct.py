"""Small reads of producers on this host, made by the engine's own process: no other has to wake up for them.

The sidecar hands the engine, read-only, the pool and the lease board of each producer it has reached over shared
memory. A lease whose mark stands there before and after the copy was valid all the while (see lease_board), so that
the copy is as good as the sidecar's; what it does not show is left to the sidecar.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from array import array
from collections.abc import Sequence

import msgspec

from sidecar.copy_executor import Moves, copies_natively
from sidecar.errors import Refusal
from sidecar.layout import KvLayout
from sidecar.lease_board import BoardView, mark_of
from sidecar.message import ProducerKey
from sidecar.protocol import PoolClosed, PoolOpened, PullSource, ReadDirectly
from sidecar.regions import F_GET_SEALS, F_SEAL_SHRINK, Region, size_of
from sidecar.spans import Destination, check_spans

logger = logging.getLogger(__name__)

MAX_BYTES = 8 << 20
"""Of one read, which blocks its caller: about a millisecond of copying. The sidecar copies what is larger."""
FAULT_IN_BYTES = 2 << 20
"""At a time: letting go of a pool waits for it, and so does whoever maps memory in the engine's process (0.2 ms)."""
ASK_EVERY_S = 1.0


class _Near:
    """One producer's pool and board, mapped."""

    def __init__(self, layout: KvLayout, pool_fd: int, board_fd: int) -> None:
        """Maps the descriptors, which stay the caller's. Raises OSError."""
        if not (_keeps_its_size(pool_fd, layout.pool_bytes) and _keeps_its_size(board_fd, 0)):
            raise OSError(0, "it might shrink under a copy")
        self.layout = layout
        self.pool = Region(pool_fd, layout.pool_bytes, writable=False, faulted_in=False)
        self.pool.keep_here()
        try:
            self.board = BoardView(os.dup(board_fd))
        except OSError:
            self.pool.close()
            raise
        self._closing = False
        self._faulting_in = threading.Thread(target=self._fault_in, name="fault-in-pool", daemon=True)
        try:
            self._faulting_in.start()
        except RuntimeError as error:  # at the limit of threads
            self.pool.close()
            self.board.close()
            raise OSError(errno.EAGAIN, str(error)) from error

    def close(self) -> None:
        self._closing = True
        self._faulting_in.join()
        self.pool.close()
        self.board.close()

    def _fault_in(self) -> None:
        """Reads do not wait for it: until it is through some pay for their first touches."""
        for start in range(0, self.pool.num_bytes, FAULT_IN_BYTES):
            if self._closing or not self.pool.fault_in(start, FAULT_IN_BYTES):
                return


class DirectReads:
    """What one client can read by itself. Thread-safe; reads go one after the other, and none outlives `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layout: KvLayout | None = None
        self._address = 0
        self._near: dict[ProducerKey, _Near] = {}
        self._asked_at = self._heard_at = self._doubted_at = 0.0

    @staticmethod
    def possible() -> bool:
        """Without the native copy each piece is a step of Python, for which the engine's thread is not ours."""
        return copies_natively()

    def begin(self, address: int, layout: KvLayout) -> None:
        """Our pool lies at `address`, from now on."""
        with self._lock:
            self._address, self._layout = address, layout

    def opened(self, message: PoolOpened, fds: Sequence[int]) -> None:
        """A producer has been reached; `fds`, taken over, are its pool's and its board's."""
        self.closed(PoolClosed(message.host, message.port, message.engine_id, message.epoch))
        try:
            near = _Near(message.layout, *fds)
        except OSError as error:
            logger.info("producer_not_mapped engine_id=%s error=%s", message.engine_id, error)
            return
        finally:
            for fd in fds:
                os.close(fd)
        with self._lock:
            self._near[message.host, message.port, message.engine_id, message.epoch] = near

    def closed(self, message: PoolClosed) -> None:
        """The producer is gone, or idle."""
        with self._lock:  # which reads hold
            near = self._near.pop((message.host, message.port, message.engine_id, message.epoch), None)
        if near is not None:
            near.close()

    def close(self) -> None:
        """Forget every producer, and our pool. Idempotent."""
        with self._lock:
            self._layout = None
            known, self._near = self._near, {}
        for near in known.values():
            near.close()

    def read(self, source: PullSource, local_block_ids: Sequence[int], first_block: int) -> ReadDirectly | None:
        """Copy the lease's blocks from `first_block` on; None where that is for the sidecar to do.

        Our blocks may have been written into then all the same.
        """
        began = time.monotonic()
        num_bytes = self._read(source, local_block_ids, first_block)
        if not num_bytes:
            return None
        source, now = msgspec.structs.replace(source, packed_block_ids=b""), time.monotonic()
        asks = not self._asked_at and now - self._heard_at > ASK_EVERY_S
        if asks:
            self._asked_at = now
        return ReadDirectly(source, len(local_block_ids), num_bytes, now - began, asks)

    def heard(self) -> None:
        """The sidecar has answered."""
        self._asked_at, self._heard_at = 0.0, time.monotonic()

    def is_unheard(self, limit_s: float) -> bool:
        """Whether the sidecar has been asked `limit_s` ago whether it hears of our reads, and has not answered.

        It is doubted for a while first: after a pause of our own process its answer lies there unread.
        """
        now = time.monotonic()
        if not self._asked_at or now - self._asked_at < limit_s:
            self._doubted_at = 0.0
            return False
        self._doubted_at = self._doubted_at or now
        return now - self._doubted_at > ASK_EVERY_S

    def _read(self, source: PullSource, local_block_ids: Sequence[int], first_block: int) -> int:
        """The bytes."""
        packed = source.packed_block_ids
        with self._lock:
            near = self._near.get(source.producer)
            if near is None or self._layout is None or not packed or len(packed) % 8:
                return 0
            if len(local_block_ids) * self._layout.block_bytes > MAX_BYTES:
                return 0
            mark = mark_of(source.transfer_id, source.token, packed)
            if not near.board.holds(mark):
                return 0
            try:
                num_bytes = self._copy(near, self._layout, array("Q", packed), local_block_ids, first_block)
            except Refusal:
                return 0  # the sidecar says why
            return num_bytes if near.board.holds(mark) else 0

    def _copy(self, near: _Near, ours: KvLayout, remote: Sequence[int], local: Sequence[int], first_block: int) -> int:
        """Raises Refusal("invalid")."""
        wanted = remote[first_block : first_block + len(local)]
        if len(wanted) != len(local):
            raise Refusal("invalid", f"{len(local)} blocks from {first_block} on are wanted of {len(remote)}")
        spans = Destination(ours, local).plan(near.layout, wanted)
        check_spans(spans, near.layout.pool_bytes, ours.pool_bytes)
        if spans:
            Moves(self._address, spans.local, near.pool.address, spans.remote, spans.lengths, spans.each).copy()
        return spans.num_bytes


def _keeps_its_size(fd: int, num_bytes: int) -> bool:
    """Whether nobody can take memory away from under a mapping, which would end this process."""
    with contextlib.suppress(OSError):
        return bool(fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK) and size_of(fd) >= num_bytes
    return False

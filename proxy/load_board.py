"""Loads across worker processes, in memory that all of them map.

The board has a row for each worker process and a slot for each instance. A worker writes its own row only and adds up
the others' when it chooses: no lock, no message. Values are aligned, of 8 bytes, and copied in one piece; a reader may
see one figure of a request counted and another not yet, which is off by that one request. Two workers that choose in
the same moment don't see each other, so a limit may be passed by one request for each other worker.

An instance has the same slot in every worker. Slots are found by a digest of role and address, under a file lock that
only joining and leaving instances take; a slot is free again when no row uses it. The row of a worker that died is
wiped by the parent, and its load with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic_ns
from typing import Protocol

from proxy.load_ledger import InstanceLoad, Reservation

NUM_SLOTS = 8192  # twice the instances there may be: members of one worker and waiting ones of another
CELL_BYTES = 8
FIGURES = 8  # cells for one instance in one row: a cache line, so that writers don't disturb each other
TOKENS, REQUESTS, KV_TOKENS, POLICY_LOAD, LAST_PICK, LAST_END, PRESENT = range(7)
WORKER_CELLS = 8
SERVING, CONNECTIONS, WAITING, HEAD_SINCE, BEAT = range(5)
STALE_NS = 2_000_000_000  # a worker that has not stirred for so long is not waited for; it stirs four times a second

# Native sizes, so that each value is copied in one piece.
_READ = struct.Struct("@5q").unpack_from
_WRITE = struct.Struct("@4q").pack_into
_WRITE_ONE = struct.Struct("@q").pack_into


class HasLoad(Protocol):
    @property
    def load(self) -> InstanceLoad: ...


class LoadBoard:
    """The memory; made by the parent, mapped by whoever it forks."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._directory = num_workers * WORKER_CELLS
        self._figures = self._directory + NUM_SLOTS
        size = (self._figures + NUM_SLOTS * num_workers * FIGURES) * CELL_BYTES
        self.lock_fd = _memory_file(size)
        self.memory = mmap.mmap(self.lock_fd, size)
        self.cells = memoryview(self.memory).cast("q")

    def close(self) -> None:
        self.cells.release()
        self.memory.close()
        os.close(self.lock_fd)

    def row(self, worker: int) -> BoardRow:
        return BoardRow(self, worker)

    def worker_cell(self, worker: int, cell: int) -> int:
        return worker * WORKER_CELLS + cell

    def tag_cell(self, slot: int) -> int:
        return self._directory + slot

    def figures_cell(self, slot: int, worker: int) -> int:
        return self._figures + (slot * self.num_workers + worker) * FIGURES

    def is_used(self, slot: int) -> bool:
        return any(self.cells[self.figures_cell(slot, one) + PRESENT] for one in range(self.num_workers))

    def wipe(self, worker: int) -> None:
        """What a worker that is dead had written."""
        first = self.worker_cell(worker, 0)
        for cell in range(first, first + WORKER_CELLS):
            self.cells[cell] = 0
        for slot in range(NUM_SLOTS):
            if self.cells[self.tag_cell(slot)]:
                self.clear(self.figures_cell(slot, worker))

    def clear(self, at: int) -> None:
        for cell in range(at, at + FIGURES):
            self.cells[cell] = 0

    def missing(self) -> list[int]:
        """The workers that don't serve now."""
        return [one for one in range(self.num_workers) if not self.cells[self.worker_cell(one, SERVING)]]


class BoardRow:
    """A worker's own row, to write, and those of the others, to read."""

    def __init__(self, board: LoadBoard, worker: int) -> None:
        self.board = board
        self.worker = worker
        self.others = tuple(one for one in range(board.num_workers) if one != worker)
        self._mine = board.worker_cell(worker, 0)
        self._num_users: dict[int, int] = {}
        """By slot: loads of ours in it. A waiting instance and a member that leaves may share one."""

        self.names: dict[int, str] = {}
        """By slot: what this worker calls the instance."""
        self.slots: dict[tuple[str, str], int] = {}
        """By role and that name."""

    # --- instances

    def load_of(self, role: str, key: str, name: str = "") -> SharedLoad:
        """`key` is one for all spellings of its address, `name` the one that is used here."""
        tag = _tag(f"{role} {key}")
        slot = self._join(tag)
        self.names[slot] = name or key
        self.slots[role, name or key] = slot
        return SharedLoad(self, slot, tag)

    def _join(self, tag: int) -> int:
        board = self.board
        with self._locked():
            slot = self._find(tag)
            board.cells[board.tag_cell(slot)] = tag
            board.cells[board.figures_cell(slot, self.worker) + PRESENT] = 1
        self._num_users[slot] = self._num_users.get(slot, 0) + 1
        return slot

    def _find(self, tag: int) -> int:
        """The slot that has `tag`, else the first that nobody uses. Raises MemoryError."""
        board, free = self.board, -1
        for step in range(NUM_SLOTS):
            slot = (tag + step) % NUM_SLOTS
            found = board.cells[board.tag_cell(slot)]
            if found == tag:
                return slot
            if free < 0 and (not found or not board.is_used(slot)):
                free = slot
            if not found:
                break
        if free < 0:
            raise MemoryError(f"the load board has {NUM_SLOTS} slots, and all are used")
        return free

    def leave(self, slot: int) -> None:
        self._num_users[slot] -= 1
        if not self._num_users[slot]:
            del self._num_users[slot]
            del self.names[slot]
            for key in [key for key, at in self.slots.items() if at == slot]:
                del self.slots[key]
            self.board.clear(self.board.figures_cell(slot, self.worker))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The kernel lets go of it when the holder dies."""
        fcntl.lockf(self.board.lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.board.lock_fd, fcntl.LOCK_UN)

    def look(self, instances: Iterable[HasLoad]) -> None:
        """Bring `others_*` and `last_pick` of their loads up to date: called before a choice."""
        memory = self.board.memory
        for one in instances:
            load = one.load
            if not isinstance(load, SharedLoad):
                continue
            tokens = requests = kv_tokens = policy_load = 0
            last_pick = load.last_pick
            for at in load.others_at:
                more_tokens, more_requests, more_kv, more_policy_load, pick = _READ(memory, at)
                tokens += more_tokens
                requests += more_requests
                kv_tokens += more_kv
                policy_load += more_policy_load
                if pick > last_pick:
                    last_pick = pick
            load.others_tokens = tokens
            load.others_requests = requests
            load.others_kv_tokens = kv_tokens
            load.others_policy_load = policy_load
            load.last_pick = last_pick

    # --- the worker itself

    def note(self, cell: int, value: int) -> None:
        self.board.cells[self._mine + cell] = value

    def read(self, worker: int, cell: int) -> int:
        return self.board.cells[self.board.worker_cell(worker, cell)]

    def beat(self) -> None:
        self.note(BEAT, monotonic_ns())

    def awake(self) -> list[int]:
        """The other workers that serve and have stirred lately."""
        since = monotonic_ns() - STALE_NS
        return [one for one in self.others if self.read(one, SERVING) and self.read(one, BEAT) > since]

    def num_waiting_elsewhere(self) -> int:
        return sum(self.read(one, WAITING) for one in self.others)

    def is_first(self, since_ns: int) -> bool:
        """Whether nobody else's first waiting request is older. A worker that does not stir is not waited for."""
        heads = [self.read(one, HEAD_SINCE) for one in self.awake()]
        return not any(head and head < since_ns for head in heads)


class SharedLoad(InstanceLoad):
    """An `InstanceLoad` that the other workers see."""

    __slots__ = ("_at", "_memory", "_row", "_slot", "_tag", "others_at")

    def __init__(self, row: BoardRow, slot: int, tag: int) -> None:
        super().__init__()
        self._tag = tag
        board = row.board
        self._row = row
        self._slot = slot
        self._memory: mmap.mmap | bytearray = board.memory
        self._at = board.figures_cell(slot, row.worker) * CELL_BYTES
        self.others_at = tuple(board.figures_cell(slot, one) * CELL_BYTES for one in row.others)

    def leave(self) -> None:
        """Work that is still open is counted on, for nobody to see."""
        if self.others_at:
            self.others_at = ()
            self._memory, self._at = bytearray(FIGURES * CELL_BYTES), 0
            self._row.leave(self._slot)

    def is_used_elsewhere(self) -> bool:
        """Whether another worker has not let go of the instance yet."""
        row, board = self._row, self._row.board
        if board.cells[board.tag_cell(self._slot)] != self._tag:
            return False
        return any(board.cells[board.figures_cell(self._slot, one) + PRESENT] for one in row.others)

    def changed(self) -> None:
        _WRITE(self._memory, self._at, self.num_tokens, self.num_requests, self.kv_tokens, self.policy_load)

    def picked(self) -> None:
        """In the order of picks by all workers: the clock is one for all processes."""
        self.last_pick = now = monotonic_ns()
        _WRITE_ONE(self._memory, self._at + LAST_PICK * CELL_BYTES, now)

    def reserve(self, num_tokens: int, kv_tokens: int = 0) -> Reservation:
        self.num_tokens += num_tokens
        self.kv_tokens += kv_tokens
        self.num_requests += 1
        self.total_requests += 1
        self.changed()
        return SharedReservation(self, num_tokens, kv_tokens)

    def has_room(self, kv_tokens: int) -> bool:
        num_requests = self.num_requests + self.others_requests
        if not num_requests:
            return True
        if self.max_streams and num_requests >= self.max_streams:
            return False
        return not self.max_kv_tokens or self.kv_tokens + self.others_kv_tokens + kv_tokens <= self.max_kv_tokens

    def observe_queue(self, num_tokens: float, began: float, now: float) -> None:
        """The work before it may have been another worker's."""
        ends = (self._row.board.cells[at // CELL_BYTES + LAST_END] for at in self.others_at)
        super().observe_queue(num_tokens, max(began, max(ends, default=0) / 1e9), now)
        _WRITE_ONE(self._memory, self._at + LAST_END * CELL_BYTES, int(now * 1e9))


class SharedReservation(Reservation):
    __slots__ = ()

    def release(self) -> None:
        load = self._load
        if load is not None:
            super().release()
            load.changed()


def _tag(name: str) -> int:
    """Never zero, which is an empty slot."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1 or 1


def _memory_file(size: int) -> int:
    """A file without a name: it is gone with the last process that has it."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("pd-proxy-load-board", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor

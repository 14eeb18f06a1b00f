"""Threads that copy spans of mapped memory, chunk by chunk and fair between transfers.

Copying runs without the interpreter's lock. A long transfer does not hold back a short one: after each chunk
a worker takes the next chunk of the transfer that has waited longest.
"""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from sidecar.copy_library import copy_moves
from sidecar.small_pieces import MIN_PIECES, copy_small, longest, running_sums

CHUNK_BYTES = 1 << 20
"""About 0.2 ms of copying: how long a stop, or a short transfer behind a long one, waits at most for each thread."""
LAST_CHUNK_BYTES = 256 << 10
"""The chunks of a shared job shrink to this towards its end, so that its threads end at about the same time."""
LAST_WAIT_S = 60e-6
"""Who assists looks out this long for the last chunk of another thread: less than sleeping and being woken costs."""
MIN_SHARED_SPAN_BYTES = 48 << 10
"""Below this the threads spend more on passing the interpreter's lock than they gain (measured: 16 KiB loses)."""

Move = tuple[int, int, int]
"""(destination address, source address, bytes)."""

_memmove = ctypes.memmove
_copy_moves = copy_moves()


def copies_natively() -> bool:
    """Whether moves are copied by one C call, with what other processors wrote seen in order around it."""
    return _copy_moves is not None


class Moves:
    """Moves in columns, relative to two addresses: a chunk of them is copied without a step of Python for each."""

    __slots__ = ("each", "lengths", "starts", "starts_base", "to", "to_base")

    def __init__(
        self, to_base: int, to: Sequence[int], starts_base: int, starts: Sequence[int], lengths: Sequence[int],
        each: int = 0,
    ) -> None:  # fmt: skip
        """`each`, if not 0: the bytes of every one."""
        self.to_base = to_base
        self.to = to
        self.starts_base = starts_base
        self.starts = starts
        self.lengths = lengths
        self.each = each

    @classmethod
    def of(cls, moves: Sequence[Move]) -> Moves:
        to, starts, lengths = zip(*moves, strict=True)
        return cls(0, to, 0, starts, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Move]:
        return zip(
            map(self.to_base.__add__, self.to), map(self.starts_base.__add__, self.starts), self.lengths, strict=True
        )

    def part(self, first: int, end: int) -> Moves:
        return Moves(
            self.to_base, self.to[first:end], self.starts_base, self.starts[first:end], self.lengths[first:end]
        )

    def copy(self) -> None:
        if _copy_moves is not None:
            given = (self.to, self.starts, self.lengths)
            columns = [column if isinstance(column, array) else array("q", column) for column in given]
            to_at, starts_at, lengths_at = (column.buffer_info()[0] for column in columns)
            _copy_moves(self.to_base, to_at, self.starts_base, starts_at, lengths_at, len(self.lengths))
            return
        if copy_small(self.to_base, self.to, self.starts_base, self.starts, self.lengths):
            return
        to, starts = map(self.to_base.__add__, self.to), map(self.starts_base.__add__, self.starts)
        deque(map(_memmove, to, starts, self.lengths), maxlen=0)


class CopyJob:
    """One transfer's copy. `on_end(completed)` is called once, on a worker thread, when nothing writes any more."""

    def __init__(
        self, moves: Moves | Sequence[Move], on_end: Callable[[bool], None], chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        if not isinstance(moves, Moves):
            moves = Moves.of(moves)
        if (moves.each or longest(moves.lengths)) > chunk_bytes:
            moves = Moves.of([piece for move in moves for piece in _pieces(move, chunk_bytes)])
        self._moves = moves
        each, num_moves = moves.each, len(moves)
        self._ends = range(each, each * (num_moves + 1), each) if each else running_sums(moves.lengths)
        self._chunk_bytes = chunk_bytes
        self._on_end = on_end
        self._index = 0
        mean = self._ends[-1] // len(moves)
        self.alone = _copy_moves is None and chunk_bytes // MIN_PIECES < mean < MIN_SHARED_SPAN_BYTES
        self.active = 0
        self.stopped = False
        self.assisted = False

    @property
    def exhausted(self) -> bool:
        return self.stopped or self._index >= len(self._moves)

    def next_chunk(self) -> tuple[Moves, int]:
        """The next moves, a chunk together or a little less, and their bytes."""
        first = self._index
        done = self._ends[first - 1] if first else 0
        wanted = self._chunk_bytes
        if not self.alone:
            wanted = min(wanted, max(LAST_CHUNK_BYTES, (self._ends[-1] - done) // 4))
        self._index = bisect_right(self._ends, done + wanted, lo=first + 1)
        return self._moves.part(first, self._index), self._ends[self._index - 1] - done

    def end(self) -> None:
        self._on_end(not self.stopped)


def _pieces(move: Move, piece_bytes: int) -> list[Move]:
    destination, source, length = move
    return [
        (destination + start, source + start, min(piece_bytes, length - start))
        for start in range(0, length, piece_bytes)
    ]


class CopyExecutor:
    """`num_threads` workers. `bytes_per_s` caps all copying together, to leave memory bandwidth to the engine."""

    def __init__(self, num_threads: int, bytes_per_s: int = 0) -> None:
        self._bytes_per_s = bytes_per_s
        self._chunk_bytes = min(CHUNK_BYTES, max(4096, bytes_per_s // 50)) if bytes_per_s else CHUNK_BYTES
        self._queue: deque[CopyJob] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._free_at = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"copy-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_queued(self) -> int:
        """Jobs with moves that no thread has taken yet."""
        with self._condition:
            return len(self._queue)

    def submit(
        self, moves: Moves | Sequence[Move], on_end: Callable[[bool], None], *, may_assist: bool = False
    ) -> CopyJob:
        """Begin copying; `moves` is not empty. See CopyJob.

        Of a caller that `may_assist` one thread less is woken, where that pays: the job is `assisted` then, and the
        caller goes on calling `assist` until that says no.
        """
        job = CopyJob(moves, on_end, self._chunk_bytes)
        with self._condition:
            job.assisted = may_assist and not self._queue and not self._bytes_per_s
            if self._closing:
                job.stopped = True
            else:
                self._queue.append(job)
                self._condition.notify(self._wanted(job))
        if job.stopped:
            job.end()
        return job

    def assist(self, job: CopyJob) -> bool:
        """Copy the next chunk, of whichever job, on the calling thread; False when none of `job` is left to begin."""
        with self._condition:
            if not job.assisted or job.exhausted or not self._queue:
                return False
            next_job, chunk, _ = self._next()
        self._copy(next_job, chunk)
        enough = time.perf_counter() + LAST_WAIT_S
        while job.exhausted and job.active and time.perf_counter() < enough:
            time.sleep(0)
        return True

    def stop(self, job: CopyJob) -> None:
        """Write no further chunk; the job ends when those under way are through. A finished job is left alone."""
        with self._condition:
            if job.exhausted:
                return
            job.stopped = True
            if job in self._queue:
                self._queue.remove(job)
            ended = job.active == 0
            self._condition.notify_all()
        if ended:
            job.end()

    def close(self) -> None:
        """Stop every job and end the threads."""
        with self._condition:
            self._closing = True
            jobs = list(self._queue)
        for job in jobs:
            self.stop(job)
        with self._condition:
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._closing:
                    self._condition.wait()
                if not self._queue:
                    return
                job, chunk, num_bytes = self._next()
                self._throttle(job, num_bytes)
            self._copy(job, chunk)

    def _copy(self, job: CopyJob, chunk: Moves) -> None:
        if not job.stopped:
            chunk.copy()
        with self._condition:
            job.active -= 1
            job.stopped = job.stopped or (self._closing and not job.exhausted)
            if job.alone and not job.exhausted:
                self._queue.append(job)
                if len(self._queue) > 1:  # else this thread takes it up again itself
                    self._condition.notify()
            ended = job.active == 0 and job.exhausted
        if ended:
            job.end()

    def _wanted(self, job: CopyJob) -> int:
        """How many threads to wake for a job."""
        if job.assisted:
            return 0 if job.alone else max(1, len(self._threads) - 1)
        return 1 if job.alone else len(self._threads)

    def _next(self) -> tuple[CopyJob, Moves, int]:
        """The next chunk of the job that has waited longest; called with the lock held."""
        job = self._queue.popleft()
        chunk, num_bytes = job.next_chunk()
        job.active += 1
        if not job.exhausted and not job.alone:
            self._queue.append(job)
        return job, chunk, num_bytes

    def _throttle(self, job: CopyJob, num_bytes: int) -> None:
        """Wait, lock released, until the cap allows `num_bytes` more or the job is stopped."""
        if not self._bytes_per_s:
            return
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + num_bytes / self._bytes_per_s
        while not job.stopped and (wait_s := start - time.monotonic()) > 0:
            self._condition.wait(wait_s)

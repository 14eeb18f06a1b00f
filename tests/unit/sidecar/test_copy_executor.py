from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Iterator

import pytest

from sidecar import copy_executor
from sidecar.copy_executor import CopyExecutor, CopyJob, Move, Moves


class Buffers:
    def __init__(self, num_bytes: int) -> None:
        self.source = ctypes.create_string_buffer(random.Random(1).randbytes(num_bytes), num_bytes)
        self.target = ctypes.create_string_buffer(num_bytes)

    def move(self, to: int, start: int, length: int) -> Move:
        return ctypes.addressof(self.target) + to, ctypes.addressof(self.source) + start, length


@pytest.fixture(autouse=True, params=["library", "python"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(copy_executor, "_copy_moves", None)
    elif copy_executor._copy_moves is None:
        pytest.skip("built without a C compiler")


@pytest.fixture(params=[1, 3])
def executor(request: pytest.FixtureRequest) -> Iterator[CopyExecutor]:
    executor = CopyExecutor(request.param)
    yield executor
    executor.close()


class End:
    """Collects the ends of a job."""

    def __init__(self) -> None:
        self.ends: list[bool] = []
        self._ended = threading.Event()

    def __call__(self, completed: bool) -> None:
        self.ends.append(completed)
        self._ended.set()

    def wait(self) -> bool:
        assert self._ended.wait(20)
        return self.ends[0]


@pytest.mark.parametrize("span_bytes", [100, 50_000, 3_000_000])
def test_everything_is_copied_and_ends_once(executor: CopyExecutor, span_bytes: int) -> None:
    num_bytes = 12_000_000
    buffers = Buffers(num_bytes)
    starts = list(range(0, num_bytes, span_bytes))
    moves = [buffers.move(start, start, min(span_bytes, num_bytes - start)) for start in starts]
    random.Random(2).shuffle(moves)
    end = End()
    executor.submit(moves, end)
    assert end.wait()
    assert buffers.target.raw == buffers.source.raw
    assert end.ends == [True]


def test_many_jobs_at_once(executor: CopyExecutor) -> None:
    buffers = Buffers(1 << 20)
    ends = [End() for _ in range(64)]
    for index, end in enumerate(ends):
        executor.submit([buffers.move(index << 14, index << 14, 1 << 14)], end)
    assert all(end.wait() for end in ends)
    assert buffers.target.raw == buffers.source.raw


def test_a_stopped_job_writes_no_more_and_ends_once() -> None:
    executor = CopyExecutor(1, bytes_per_s=100_000)
    buffers = Buffers(1 << 20)
    end = End()
    job = executor.submit([buffers.move(0, 0, 1 << 20)], end)
    executor.stop(job)
    executor.stop(job)
    assert end.wait() is False
    copied = buffers.target.raw
    assert copied != buffers.source.raw
    executor.close()
    assert buffers.target.raw == copied and end.ends == [False]


def test_stopping_a_finished_job_changes_nothing(executor: CopyExecutor) -> None:
    buffers = Buffers(100)
    end = End()
    job = executor.submit([buffers.move(0, 0, 100)], end)
    assert end.wait()
    executor.stop(job)
    assert end.ends == [True]


def test_closing_ends_what_waits_and_what_comes_later() -> None:
    executor = CopyExecutor(1, bytes_per_s=1_000_000)
    buffers = Buffers(1 << 20)
    ends = [End() for _ in range(3)]
    for end in ends[:2]:
        executor.submit([buffers.move(0, 0, 1 << 20)], end)
    executor.close()
    executor.submit([buffers.move(0, 0, 100)], ends[2])
    assert [end.wait() for end in ends] == [False, False, False]
    assert [end.ends for end in ends] == [[False]] * 3


def test_chunks_cover_a_job_without_overlap() -> None:
    moves = [(1000, 5000, 700), (3000, 9000, 10), (4000, 100, 291), (5000, 200, 1)]
    job = CopyJob(moves, lambda completed: None, 300)
    chunks = []
    while not job.exhausted:
        chunks.append(job.next_chunk())
    assert [num_bytes for _, num_bytes in chunks] == [300, 300, 110, 292]
    assert all(sum(length for _, _, length in chunk) == num_bytes for chunk, num_bytes in chunks)
    pieces = [piece for chunk, _ in chunks for piece in chunk]
    assert [byte for to, _, length in pieces for byte in range(to, to + length)] == [
        byte for to, _, length in moves for byte in range(to, to + length)
    ]
    assert all(to - start in (-4000, -6000, 3900, 4800) for to, start, _ in pieces)


def test_a_short_job_passes_a_long_one() -> None:
    executor = CopyExecutor(1, bytes_per_s=20_000_000)
    buffers = Buffers(16 << 20)
    long, short = End(), End()
    executor.submit([buffers.move(0, 0, 16 << 20)], long)
    executor.submit([buffers.move(0, 0, 1000)], short)
    assert short.wait()
    assert long.ends == []
    executor.close()


@pytest.mark.parametrize("span_bytes", [100, 50_000, 3_000_000])
def test_who_submits_may_assist_until_nothing_is_left_to_begin(executor: CopyExecutor, span_bytes: int) -> None:
    num_bytes = 12_000_000
    buffers = Buffers(num_bytes)
    end = End()
    moves = [buffers.move(at, at, min(span_bytes, num_bytes - at)) for at in range(0, num_bytes, span_bytes)]
    job = executor.submit(moves, end, may_assist=True)
    assert job.assisted
    while executor.assist(job):
        pass
    assert end.wait() and end.ends == [True]
    assert buffers.target.raw == buffers.source.raw
    assert not executor.assist(job)


def test_one_who_assists_takes_what_has_waited_longest(executor: CopyExecutor) -> None:
    """Jobs that come behind one that is assisted are the workers' own, whether or not somebody goes on assisting."""
    buffers = Buffers(1 << 20)
    moves = [buffers.move(at, at, 100) for at in range(0, 1 << 20, 128)]
    ends = [End() for _ in range(20)]
    jobs = [executor.submit(moves, end, may_assist=True) for end in ends]
    while executor.assist(jobs[0]):
        pass
    assert all(end.wait() for end in ends)


def test_a_stopped_job_is_not_assisted(executor: CopyExecutor) -> None:
    buffers = Buffers(1 << 20)
    for _ in range(20):  # of which other threads may do some in whole before this one goes on
        end = End()
        job = executor.submit([buffers.move(at, at, 100) for at in range(0, 1 << 20, 128)], end, may_assist=True)
        executor.stop(job)
        assert not executor.assist(job)
        if not end.wait():
            return
    raise AssertionError("no job was stopped")


def test_nobody_assists_under_a_cap() -> None:
    executor = CopyExecutor(1, bytes_per_s=1 << 30)
    buffers = Buffers(1 << 20)
    end = End()
    job = executor.submit([buffers.move(0, 0, 1 << 20)], end, may_assist=True)
    assert not job.assisted and not executor.assist(job)
    assert end.wait()
    executor.close()


def test_equal_moves_need_no_sums() -> None:
    buffers = Buffers(1 << 20)
    starts = list(range(0, 1 << 20, 4096))
    to, start = (ctypes.addressof(buffer) for buffer in (buffers.target, buffers.source))
    job = CopyJob(Moves(to, starts, start, starts, [4096] * 256, 4096), End(), chunk_bytes=10_000)
    sizes = []
    while not job.exhausted:
        chunk, num_bytes = job.next_chunk()
        chunk.copy()
        assert num_bytes == 4096 * len(chunk)
        sizes.append(len(chunk))
    assert sizes == [2] * 128 and buffers.target.raw == buffers.source.raw

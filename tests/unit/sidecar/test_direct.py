"""What a client reads by itself: only what the board shows, within its limits, and nothing it has let go of."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator

import msgspec
import pytest

from sidecar.direct import MAX_BYTES, DirectReads
from sidecar.layout import KvLayout, Plane
from sidecar.lease_board import LeaseBoard, mark_of
from sidecar.protocol import PoolClosed, PoolOpened, PullSource, pack_block_ids
from sidecar.regions import forbid_shrinking

BLOCK_BYTES = 4096
NUM_BLOCKS = 2 * MAX_BYTES // BLOCK_BYTES + 1
LAYOUT = KvLayout(NUM_BLOCKS, 16, (Plane(0, BLOCK_BYTES, BLOCK_BYTES),), 1, 1, 1, "float32", "m", "block,layer,o")
KEY = ("h", 1, "p", "epoch")
SOURCE = PullSource(*KEY[:3], "t", "secret", KEY[3], 3, pack_block_ids([3, 1, 2]))

pytestmark = pytest.mark.skipif(not DirectReads.possible(), reason="the C library was not built here")


class Pool:
    """Memory whose block b is filled with b + `first`."""

    def __init__(self, first: int, num_bytes: int = LAYOUT.pool_bytes, *, sealed: bool = True) -> None:
        self.fd = os.memfd_create("pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, num_bytes)
        if sealed:
            forbid_shrinking(self.fd)
        self.memory = mmap.mmap(self.fd, num_bytes)
        for block_id in range(8):
            self.memory[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES] = bytes([block_id + first]) * BLOCK_BYTES
        self._first = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(self._first)

    def first_bytes(self, num_blocks: int) -> list[int]:
        return [self.memory[block_id * BLOCK_BYTES] for block_id in range(num_blocks)]


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def board() -> Iterator[LeaseBoard]:
    made = LeaseBoard()
    assert made.post(mark_of("t", "secret", SOURCE.packed_block_ids), 60)
    yield made
    made.close()


@pytest.fixture
def ours() -> Pool:
    return Pool(100)


@pytest.fixture
def reads(board: LeaseBoard, ours: Pool) -> Iterator[DirectReads]:
    made = DirectReads()
    made.begin(ours.address, LAYOUT)
    made.opened(PoolOpened(*KEY, LAYOUT), (os.dup(Pool(0).fd), os.dup(board.fd)))
    yield made
    made.close()


def test_blocks_are_read_while_their_mark_stands(reads: DirectReads, ours: Pool, board: LeaseBoard) -> None:
    read = reads.read(SOURCE, [0, 4], 1)
    assert read is not None and (read.num_blocks, read.num_bytes) == (2, 2 * BLOCK_BYTES) and read.seconds > 0
    assert read.source == msgspec.structs.replace(SOURCE, packed_block_ids=b"")
    assert ours.first_bytes(5) == [1, 101, 102, 103, 2]
    board.take_off(mark_of("t", "secret", SOURCE.packed_block_ids))
    assert reads.read(SOURCE, [0, 4], 1) is None


@pytest.mark.parametrize(
    ("source", "local", "first_block"),
    [
        (msgspec.structs.replace(SOURCE, token="guess"), [0], 0),
        (msgspec.structs.replace(SOURCE, epoch="another"), [0], 0),
        (msgspec.structs.replace(SOURCE, packed_block_ids=b""), [0], 0),
        (msgspec.structs.replace(SOURCE, packed_block_ids=b"1234567"), [0], 0),
        (msgspec.structs.replace(SOURCE, packed_block_ids=pack_block_ids([3, 1])), [0], 0),
        (SOURCE, [], 0),
        (SOURCE, [0, 0], 0),
        (SOURCE, [NUM_BLOCKS], 0),
        (SOURCE, [0, 1], 2),
        (SOURCE, list(range(MAX_BYTES // BLOCK_BYTES + 1)), 0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_plainly_ours_to_read_is_left_to_the_sidecar(
    reads: DirectReads, ours: Pool, source: PullSource, local: list[int], first_block: int
) -> None:
    assert reads.read(source, local, first_block) is None
    assert ours.first_bytes(5) == [100, 101, 102, 103, 104]


def test_a_block_that_is_none_of_the_producers_is_not_read(reads: DirectReads, board: LeaseBoard) -> None:
    """Its sidecar would not lease it; an engine that reads beyond a mapping is no more."""
    source = msgspec.structs.replace(SOURCE, packed_block_ids=pack_block_ids([NUM_BLOCKS]))
    assert board.post(mark_of("t", "secret", source.packed_block_ids), 60)
    assert reads.read(source, [0], 0) is None


def test_nothing_is_read_of_a_producer_or_into_a_pool_that_is_gone(reads: DirectReads, ours: Pool) -> None:
    reads.closed(PoolClosed(*KEY))
    reads.closed(PoolClosed(*KEY))
    assert reads.read(SOURCE, [0], 0) is None
    reads.close()
    reads.close()
    assert reads.read(SOURCE, [0], 0) is None


@pytest.mark.parametrize(
    "fault", ["it may shrink", "it is too small", "it is no memory", "its board is too small", "no threads are left"]
)
def test_a_pool_that_could_end_this_process_or_cannot_be_had_is_left(
    board: LeaseBoard, ours: Pool, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = DirectReads()
    reads.begin(ours.address, LAYOUT)
    pool = Pool(
        0, LAYOUT.pool_bytes // 2 if "it is too small" in fault else LAYOUT.pool_bytes, sealed="shrink" not in fault
    )
    its_board = Pool(0, 8 * BLOCK_BYTES).fd if "board" in fault else board.fd
    fds = (os.open("/dev/null", os.O_RDONLY) if "no memory" in fault else os.dup(pool.fd), os.dup(its_board))
    if "threads" in fault:
        monkeypatch.setattr(threading.Thread, "start", _no_thread)
    reads.opened(PoolOpened(*KEY, LAYOUT), fds)
    assert reads.read(SOURCE, [0], 0) is None
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)
    reads.close()


def test_a_pool_that_is_given_anew_takes_the_place_of_the_first(
    reads: DirectReads, ours: Pool, board: LeaseBoard
) -> None:
    reads.opened(PoolOpened(*KEY, LAYOUT), (os.dup(Pool(50).fd), os.dup(board.fd)))
    assert reads.read(SOURCE, [0], 0) is not None
    assert ours.first_bytes(1) == [53]

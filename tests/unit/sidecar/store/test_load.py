from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Sequence

from sidecar.copy_executor import CopyExecutor, Move
from sidecar.store.load import Load, address_of

BLOCK = 64


class Pool:
    """Four blocks in two planes of 40 and 24 bytes."""

    def __init__(self, num_blocks: int = 4) -> None:
        self.memory = bytearray(num_blocks * BLOCK)
        base = address_of(self.memory)
        self.targets = [
            [(base + index * 40, 40), (base + num_blocks * 40 + index * 24, 24)] for index in range(num_blocks)
        ]

    def block(self, index: int) -> bytes:
        return b"".join(ctypes.string_at(address, length) for address, length in self.targets[index])


def copy(moves: Sequence[Move], on_end: Callable[[bool], None]) -> None:
    """At once."""
    for move in moves:
        ctypes.memmove(*move)
    on_end(True)


class Loading:
    def __init__(self, num_blocks: int = 4) -> None:
        self.pool = Pool(num_blocks)
        self.num_ends = 0
        self.load = Load(self.pool.targets, copy, self.end)

    def end(self) -> None:
        self.num_ends += 1


def content(index: int) -> bytearray:
    return bytearray(random.Random(index).randbytes(BLOCK))


def take(loading: Loading, indices: Sequence[int], tier: str = "posix") -> None:
    for index in indices:
        loading.load.take(index, content(index), tier)


def test_blocks_land_in_their_planes_in_any_order() -> None:
    loading = Loading()
    take(loading, [2, 0, 3])
    assert loading.num_ends == 0
    take(loading, [1], "memory")
    assert loading.num_ends == 1
    assert loading.load.outcome() == (4, "", {"posix": 3, "memory": 1})
    assert [loading.pool.block(index) for index in range(4)] == [content(index) for index in range(4)]


def test_what_follows_a_missing_block_is_no_use() -> None:
    loading = Loading()
    take(loading, [3])
    loading.load.take(1, None, "")
    assert loading.load.wants(0)
    assert not loading.load.wants(2)
    take(loading, [2])
    assert loading.pool.block(2) == bytes(BLOCK)
    take(loading, [0])
    assert loading.num_ends == 1, "nobody waits for what is no use"
    assert loading.load.outcome() == (1, "missing", {"posix": 1})


def test_after_the_end_nothing_is_written() -> None:
    loading = Loading()
    take(loading, [0])
    loading.load.close("timeout")
    loading.load.close("abandoned")
    assert loading.num_ends == 1
    take(loading, [1, 2, 3])
    assert loading.num_ends == 1
    assert loading.load.outcome() == (1, "timeout", {"posix": 1})
    assert loading.pool.block(1) == bytes(BLOCK)


def test_a_copy_under_way_is_waited_for() -> None:
    """However it is timed: nothing changes after the end, and all that counts as there is there."""
    executor = CopyExecutor(2)
    for _ in range(200):
        pool, at_end, ended = Pool(8), [b""], threading.Event()

        def end(pool: Pool = pool, at_end: list[bytes] = at_end, ended: threading.Event = ended) -> None:
            at_end.append(bytes(pool.memory))
            ended.set()

        loading = Loading()
        loading.pool, loading.load = pool, Load(pool.targets, executor.submit, end)
        threads = [threading.Thread(target=take, args=(loading, [index, index + 4])) for index in range(4)]
        threads.append(threading.Thread(target=loading.load.close, args=("timeout",)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended.wait(10)
        assert at_end == [b"", bytes(pool.memory)]
        num_blocks, _, _ = loading.load.outcome()
        assert [pool.block(index) for index in range(num_blocks)] == [content(index) for index in range(num_blocks)]
    executor.close()


def test_a_copy_that_was_not_made_is_no_block() -> None:
    pool, ends = Pool(), []
    load = Load(pool.targets, lambda moves, on_end: on_end(False), lambda: ends.append(1))
    for index in range(4):
        load.take(index, content(index), "memory")
    assert (load.outcome()[0], ends) == (0, [1])

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Sequence

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


class Loading:
    def __init__(self, num_blocks: int = 4) -> None:
        self.pool = Pool(num_blocks)
        self.num_ends = 0
        self.load = Load(self.pool.targets, self.end)

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
    for _ in range(200):
        loading = Loading(8)
        at_end: list[bytes] = []
        loading.load = Load(
            loading.pool.targets, lambda loading=loading, at_end=at_end: at_end.append(bytes(loading.pool.memory))
        )  # type: ignore[misc]
        threads = [threading.Thread(target=take, args=(loading, [index, index + 4])) for index in range(4)]
        threads.append(threading.Thread(target=loading.load.close, args=("timeout",)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert at_end == [bytes(loading.pool.memory)]
        num_blocks, _, _ = loading.load.outcome()
        assert [loading.pool.block(index) for index in range(num_blocks)] == [content(i) for i in range(num_blocks)]

"""What an engine is given of its producers: both descriptors or nothing, and each once."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from sidecar.direct_pools import DirectPools, Spare
from sidecar.layout import KvLayout, Plane
from sidecar.protocol import Message, PoolClosed, PoolOpened

LAYOUT = KvLayout(1, 16, (Plane(0, 8, 8),), 1, 1, 1, "float32", "m", "o")
KEY = ("h", 1, "p", "epoch")


class Engine:
    def __init__(self, *, reads: bool = True) -> None:
        self.heard: list[Message] = []
        self.reads = reads

    def hand_over(self, message: Message, fds: Sequence[int]) -> bool:
        assert len(fds) == 2
        if self.reads:
            self.heard.append(message)
        return self.reads


@pytest.fixture
def spare() -> Spare:
    made = Spare()
    fd = os.open("/dev/null", os.O_RDONLY)
    made.keep_pool(fd)
    made.keep_board(fd)
    os.close(fd)
    return made


def test_a_producer_is_given_and_taken_back_once(spare: Spare) -> None:
    engine = Engine()
    pools = DirectPools(engine.hand_over, engine.heard.append)
    pools.give(KEY, LAYOUT, spare)
    pools.take_back(KEY)
    pools.take_back(KEY)
    assert engine.heard == [PoolOpened(*KEY, LAYOUT), PoolClosed(*KEY)]
    spare.close()


def test_what_could_not_be_handed_over_is_not_taken_back(spare: Spare) -> None:
    engine = Engine(reads=False)
    pools = DirectPools(engine.hand_over, engine.heard.append)
    pools.give(KEY, LAYOUT, spare)
    pools.take_back(KEY)
    assert engine.heard == []
    spare.close()


def test_without_a_board_there_is_nothing_to_give() -> None:
    spare = Spare()
    with open("/dev/null") as file:
        spare.keep_pool(file.fileno())
        spare.keep_board(None)
    engine = Engine()
    DirectPools(engine.hand_over, engine.heard.append).give(KEY, LAYOUT, spare)
    assert engine.heard == [] and spare.fds() == ()
    spare.close()


def test_spare_descriptors_are_closed(spare: Spare) -> None:
    fds = spare.fds()
    spare.close()
    spare.close()
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)

from __future__ import annotations

import os

import pytest

from engine_adapter.memory.buffer import NoBuffer, StagingBuffer, slots_for, staged_layout
from sidecar.protocol import KvLayout, Plane

LAYOUT = KvLayout(
    num_blocks=100, block_size=16, planes=(Plane(64, 512, 256), Plane(60000, 1024, 1024)), num_layers=1, num_kv_heads=1,
    head_dim=8, dtype="float32", model="m", order="plain",
)  # fmt: skip


def test_the_buffer_has_the_same_blocks_without_gaps() -> None:
    staged = staged_layout(LAYOUT, 10)
    assert staged.planes == (Plane(0, 256, 256), Plane(2560, 1024, 1024))
    assert staged.num_blocks == 10
    assert staged.pool_bytes == 12800
    assert staged.meaning() == LAYOUT.meaning()


def test_a_buffer_must_hold_the_longest_request_and_is_no_larger_than_the_pool() -> None:
    assert slots_for(LAYOUT, 12 * 1280 + 5, max_blocks=12) == 12
    assert slots_for(LAYOUT, 1 << 30, max_blocks=12) == 100
    with pytest.raises(NoBuffer, match="holds 11 blocks, and the longest request has 12: at least 1 MiB"):
        slots_for(LAYOUT, 12 * 1280 - 1, max_blocks=12)


@pytest.mark.parametrize("shared", [True, False])
def test_memory_is_there_and_its_descriptor_goes(shared: bool) -> None:
    buffer = StagingBuffer(LAYOUT, 10, shared=shared)
    fd = buffer.pool.fd
    assert (fd is not None) is shared
    buffer.memory[5:8] = b"abc"
    if fd is not None:
        assert os.pread(fd, 3, 5) == b"abc"
    buffer.close()
    buffer.close()
    if fd is not None:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_what_does_not_fit_is_refused_before_it_kills_anybody() -> None:
    with pytest.raises(NoBuffer, match="does not fit"):
        StagingBuffer(LAYOUT, 1 << 40, shared=True)

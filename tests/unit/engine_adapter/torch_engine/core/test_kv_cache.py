from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engine_adapter.host_memory import available_host_memory_bytes
from engine_adapter.torch_engine.kv_cache import KvCache
from engine_adapter.torch_engine.kv_rows import BlockRows, WriteRows
from engine_adapter.torch_engine.model_shape import ModelShape
from tests.unit.engine_adapter.torch_engine.core.harness import CPU

SHAPE = ModelShape(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
NUM_BLOCKS, SIZE = 5, 4


def test_a_block_is_contiguous_over_all_layers() -> None:
    cache = KvCache(SHAPE, NUM_BLOCKS, SIZE, CPU)
    layout = cache.kv_layout("model")
    assert layout.block_bytes == cache.block_bytes == 3 * 2 * SIZE * 2 * 8 * 4
    assert layout.pool_bytes == cache.pool_bytes == NUM_BLOCKS * cache.block_bytes
    rows = WriteRows([3, 3], [0, 3], SHAPE.num_layers, SIZE, CPU.torch_device)
    cache.token_rows[rows.by_layer_and_kv[3]] = 7.0  # values of layer 1, tokens 0 and 3 of block 3
    expected = torch.zeros(NUM_BLOCKS, 3, 2, SIZE, 2, 8)
    expected[3, 1, 1, [0, 3]] = 7.0
    assert cache.fd is not None
    assert os.pread(cache.fd, cache.pool_bytes, 0) == expected.numpy().tobytes()
    assert cache.block_content(3) == expected[3].numpy().tobytes()


def test_rows_of_blocks_are_all_keys_then_all_values() -> None:
    cache = KvCache(SHAPE, NUM_BLOCKS, SIZE, CPU)
    for layer in range(3):
        for kv in range(2):
            for block_id in range(NUM_BLOCKS):
                rows = WriteRows([block_id], [1], 3, SIZE, CPU.torch_device)
                cache.token_rows[rows.by_layer_and_kv[2 * layer + kv]] = 100.0 * layer + 10 * kv + block_id
    gathered = cache.block_rows[BlockRows.of([4, 2], 3, CPU.torch_device).of_layer[2]]
    assert gathered.view(2, 2, SIZE, 2, 8)[:, :, 1, 0, 0].tolist() == [[204, 202], [214, 212]]


def test_the_pool_has_no_name_and_goes_with_its_owner() -> None:
    cache = KvCache(SHAPE, NUM_BLOCKS, SIZE, CPU)
    assert cache.fd is not None
    assert "memfd:baton-kv-pool" in os.readlink(f"/proc/self/fd/{cache.fd}")
    assert os.fstat(cache.fd).st_blocks * 512 >= cache.pool_bytes
    cache.close()
    cache.close()
    assert cache.fd is None


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    return proc, cgroup


def test_the_machines_memory(roots: tuple[Path, Path]) -> None:
    assert available_host_memory_bytes(*roots) == 4000 * 1024


def test_a_control_group_bounds_it_at_every_level(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    write(proc / "self/cgroup", "0::/outer/inner\n")
    write(cgroup / "outer/inner/memory.max", "max\n")
    write(cgroup / "outer/inner/memory.current", "10\n")
    assert available_host_memory_bytes(proc, cgroup) == 4000 * 1024
    write(cgroup / "outer/memory.max", "1000\n")
    write(cgroup / "outer/memory.current", "900\n")
    write(cgroup / "outer/memory.stat", "anon 1\ninactive_file 50\n")
    assert available_host_memory_bytes(proc, cgroup) == 150


def test_version_one_control_groups(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    write(cgroup / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(cgroup / "memory/memory.usage_in_bytes", "5\n")
    assert available_host_memory_bytes(proc, cgroup) == 4000 * 1024
    write(cgroup / "memory/memory.limit_in_bytes", "1000\n")
    assert available_host_memory_bytes(proc, cgroup) == 995


def test_where_nobody_tells(tmp_path: Path) -> None:
    assert available_host_memory_bytes(tmp_path, tmp_path) is None

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sidecar.layout import KvLayout, Plane
from sidecar.store.keys import BlockKey, namespace_of

ROOT = Path(__file__).resolve().parents[4]
LAYOUT = KvLayout(8, 16, (Plane(0, 64, 64), Plane(512, 64, 32)), 2, 4, 16, "float32", "model", "order")


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 32}, {"num_layers": 3}, {"num_kv_heads": 2}, {"head_dim": 32}, {"dtype": "bfloat16"},
        {"model": "another"}, {"order": "another"}, {"planes": (Plane(0, 64, 32), Plane(512, 64, 64))},
        {"planes": (Plane(0, 96, 96),)}, {"tp_size": 2}, {"tp_size": 2, "tp_rank": 1}, {"pp_rank": 1},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_gives_bytes_their_meaning_makes_another_namespace(changes: dict[str, object]) -> None:
    assert namespace_of(msgspec.structs.replace(LAYOUT, **changes), 0) != namespace_of(LAYOUT, 0)


def test_ranks_keep_their_own_blocks() -> None:
    assert namespace_of(LAYOUT, 0) != namespace_of(LAYOUT, 1)


@pytest.mark.parametrize("changes", [{"num_blocks": 9}, {"planes": (Plane(64, 128, 64), Plane(4096, 32, 32))}], ids=str)
def test_where_a_pool_has_its_blocks_says_nothing(changes: dict[str, object]) -> None:
    assert namespace_of(msgspec.structs.replace(LAYOUT, **changes), 0) == namespace_of(LAYOUT, 0)


def test_another_process_gives_the_same_names() -> None:
    code = (
        "from tests.unit.sidecar.store.test_keys import LAYOUT, namespace_of\n"
        "from engine_adapter.torch_engine.block_manager import BlockManager\n"
        "print(namespace_of(LAYOUT, 3).hex(), BlockManager(4, 16, salt='s').hash_full_blocks(range(32), 2)[1].hex())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert said.pop().decode().split()[0] == namespace_of(LAYOUT, 3).hex()


def test_a_key_is_a_path_and_nothing_else() -> None:
    assert str(BlockKey(b"\x01" * 16, b"/../" * 4)) == "01" * 16 + "/" + "2f2e2e2f" * 4

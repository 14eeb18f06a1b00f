from __future__ import annotations

import msgspec
import pytest

from sidecar.layout import KvLayout, Plane, layout_fault, mismatch

LAYOUT = KvLayout(10, 16, (Plane(0, 100, 80), Plane(2000, 50, 50)), 2, 4, 8, "float32", "m", "order")


def changed(**changes: object) -> KvLayout:
    return msgspec.structs.replace(LAYOUT, **changes)


def test_sizes() -> None:
    assert LAYOUT.block_bytes == 130
    assert LAYOUT.pool_bytes == 2000 + 9 * 50 + 50
    assert changed(planes=(Plane(0, 100, 80),)).pool_bytes == 980


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"block_size": -1}, "block_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"planes": ()}, "planes"),
        ({"planes": (Plane(-1, 8, 8),)}, "planes[0]"),
        ({"planes": (Plane(0, 8, 8), Plane(0, 7, 8))}, "planes[1]"),
        ({"planes": (Plane(0, 8, 0),)}, "planes[0]"),
        ({"num_blocks": 1 << 60}, "limit"),
    ],
)
def test_nonsense_is_named(changes: dict[str, object], named: str) -> None:
    assert named in layout_fault(changed(**changes))


def test_a_sound_layout_has_no_fault() -> None:
    assert layout_fault(LAYOUT) == ""


@pytest.mark.parametrize(
    "changes",
    [{"num_blocks": 99}, {"planes": (Plane(7, 200, 80), Plane(9000, 60, 50))}],
    ids=["num_blocks", "offsets and strides"],
)
def test_where_the_bytes_lie_may_differ(changes: dict[str, object]) -> None:
    assert mismatch(LAYOUT, changed(**changes)) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "n"), ("dtype", "bfloat16"), ("num_layers", 3), ("num_kv_heads", 5), ("head_dim", 9),
        ("block_size", 32), ("order", "other"),
    ],
)  # fmt: skip
def test_what_the_bytes_mean_may_not(field: str, value: object) -> None:
    message = mismatch(LAYOUT, changed(**{field: value}))
    assert message == f"{field} differs: the producer has {getattr(LAYOUT, field)!r}, the consumer has {value!r}"


def test_nor_the_bytes_of_a_block() -> None:
    assert "plane_block_bytes differs" in mismatch(LAYOUT, changed(planes=(Plane(0, 130, 130),)))

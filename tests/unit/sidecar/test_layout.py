from __future__ import annotations

import msgspec
import pytest

from sidecar.layout import KvLayout, Plane, layout_fault, mismatch, push_fault

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


CUT = msgspec.structs.replace(
    LAYOUT, planes=(Plane(0, 256, 256), Plane(2560, 512, 512)), axes=("token", "head"), tp_rank=1, tp_size=2,
    total_kv_heads=8, pp_rank=1, stage_layers=(3, 2),
)  # fmt: skip


def test_what_a_rank_holds() -> None:
    assert layout_fault(CUT) == ""
    assert (CUT.heads, CUT.layers) == (range(4, 8), range(3, 5))
    assert (LAYOUT.heads, LAYOUT.layers) == (range(4), range(2))
    replica = msgspec.structs.replace(CUT, num_kv_heads=1, total_kv_heads=2, tp_size=8, tp_rank=5)
    assert layout_fault(replica) == "" and replica.heads == range(1, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tp_size": 0}, "tp_size is 0"),
        ({"tp_rank": 2}, "tp_rank is 2 of tp_size 2"),
        ({"total_kv_heads": 0}, "total_kv_heads is 0"),
        ({"total_kv_heads": -4, "tp_size": 1, "tp_rank": 0}, "total_kv_heads is -4"),
        ({"total_kv_heads": 7}, "total_kv_heads 7 and tp_size 2: neither divides"),
        ({"total_kv_heads": 4}, "num_kv_heads is 4, of 4 over 2 ranks it must be 2"),
        ({"pp_rank": 2}, "pp_rank is 2"),
        ({"pp_rank": -1}, "pp_rank is -1"),
        ({"pp_rank": 0}, "num_layers is 2, stage_layers says 3"),
        ({"stage_layers": ()}, "pp_rank is 1 without stage_layers"),
        ({"axes": ("token", "token", "head")}, "axes is"),
        ({"axes": ("token", "head", "part:x")}, "axes is"),
        ({"axes": ("token", "heads")}, "axes is"),
        ({"axes": ("token",)}, "has no head"),
        ({"planes": (Plane(0, 250, 250),)}, "planes[0] has 250 bytes"),
        ({"planes": CUT.planes * 2 + CUT.planes[:1]}, "planes has 5"),
    ],
    ids=str,
)
def test_a_rank_of_nonsense_is_named(changes: dict[str, object], named: str) -> None:
    assert named in layout_fault(msgspec.structs.replace(CUT, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"tp_size": 1, "tp_rank": 0, "num_kv_heads": 8, "planes": (Plane(0, 512, 512), Plane(9000, 1024, 1024))},
        {"block_size": 8, "planes": (Plane(0, 128, 128), Plane(9000, 256, 256))},
        {"axes": ("head", "token")},
        {"pp_rank": 0, "stage_layers": (5,), "num_layers": 5, "planes": CUT.planes[:1] * 5},
    ],
    ids=["tensor parallel", "block size", "order", "stages"],
)  # fmt: skip
def test_how_a_model_is_cut_up_may_differ(changes: dict[str, object]) -> None:
    other = msgspec.structs.replace(CUT, **changes)
    if "stage_layers" in changes:
        alike = msgspec.structs.replace(CUT, planes=CUT.planes[:1] * 2)
        assert mismatch(alike, other) == "" == mismatch(other, alike)
        assert mismatch(CUT, other).startswith("cell_bytes differs")
        return
    assert mismatch(CUT, other) == "" == mismatch(other, CUT)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"total_kv_heads": 16, "tp_size": 4}, "num_kv_heads differs: the producer has 8, the consumer has 16"),
        ({"stage_layers": (4, 2)}, "num_layers differs: the producer has 5, the consumer has 6"),
        ({"axes": ()}, "axes differs: the producer has ('head', 'token'), the consumer has ()"),
        ({"axes": ("token", "head", "part:2")}, "axes differs"),
        ({"block_size": 24}, "block_size differs: the producer has 16, the consumer has 24: neither"),
        ({"tp_rank": 0}, "heads differs: the producer has '4 to 8', the consumer has '0 to 4'"),
        (
            {"pp_rank": 0, "stage_layers": (2, 3)},
            "layers differs: the producer has '3 to 5', the consumer has '0 to 2'",
        ),
        ({"axes": ("head", "token"), "planes": CUT.planes[::-1]}, "cell_bytes differs: the producer has (4, 8)"),
    ],
    ids=str,
)
def test_what_can_not_be_put_together_is_named(changes: dict[str, object], named: str) -> None:
    assert named in mismatch(CUT, msgspec.structs.replace(CUT, **changes))


def test_without_axes_only_the_same_heads_and_layers_match() -> None:
    whole = msgspec.structs.replace(CUT, axes=())
    assert mismatch(whole, whole) == ""
    assert "heads differs" in mismatch(whole, msgspec.structs.replace(whole, tp_size=1, tp_rank=0, num_kv_heads=8))


@pytest.mark.parametrize("side", ["producer", "consumer"])
@pytest.mark.parametrize("changes", [{"tp_size": 2, "total_kv_heads": 8}, {"stage_layers": (2, 2)}])
def test_a_push_is_between_two_ranks_that_are_alone(side: str, changes: dict[str, object]) -> None:
    assert push_fault(LAYOUT, LAYOUT) == ""
    several = changed(**changes)
    fault = push_fault(several, LAYOUT) if side == "producer" else push_fault(LAYOUT, several)
    assert fault.startswith(f"the {side} has 2 ranks")
    assert "block_size" in push_fault(LAYOUT, changed(block_size=32))

from __future__ import annotations

from dataclasses import replace

import pytest

from engine_adapter.memory.choice import PROVIDERS, NoProvider, choose
from engine_adapter.memory.contract import Place

CPU = Place("cpu", own_sidecar=True)
CUDA = Place("cuda", own_sidecar=True)
NO_SHARING = "shared memory can't be made here"


def test_the_first_that_works_is_taken_and_says_why_the_others_do_not() -> None:
    assert choose("auto", CPU).provider.name == "shm"
    on_gpu = choose("auto", replace(CUDA, environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}))
    assert on_gpu.provider.name == "staging"
    assert "shm: refused, the KV lies in cuda memory" in str(on_gpu)
    assert "device_ipc: refused, expandable segments are on" in str(on_gpu)
    assert str(on_gpu).endswith("staging is used")
    assert "device_ipc: refused, it has not run on hardware yet" in str(choose("auto", CUDA))
    assert choose("device_ipc", CUDA).provider.name == "device_ipc"
    alone = choose("auto", replace(CPU, shared_memory_fault=NO_SHARING))
    assert alone.provider.name == "in_process"
    assert dict(alone.refused)["staging"] == NO_SHARING


def test_where_nothing_works_every_reason_is_said() -> None:
    with pytest.raises(NoProvider) as error:
        choose("auto", replace(CPU, shared_memory_fault=NO_SHARING, own_sidecar=False))
    for name in PROVIDERS:
        assert f"{name}: " in error.value.reason


def test_what_is_allocated_and_staged() -> None:
    chosen = [choose(name, CPU) for name in ("shm", "staging", "in_process")]
    facts = {choice.provider.name: (choice.needs_shared_pool, choice.stages) for choice in chosen}
    assert facts == {"shm": (True, False), "staging": (False, True), "in_process": (False, False)}
    assert choose("in_process", CUDA).stages


@pytest.mark.parametrize(
    ("wanted", "place", "why"),
    [
        ("shm", CUDA, "the KV lies in cuda memory"),
        ("device_ipc", CPU, "the KV lies in host memory"),
        ("in_process", replace(CPU, own_sidecar=False), "leave sidecar at auto"),
        ("in_process", replace(CPU, transport="mooncake"), "use tcp or auto"),
        ("staging", replace(CUDA, shared_memory_fault=NO_SHARING), NO_SHARING),
    ],
)
def test_what_cannot_work_is_refused_with_its_remedy(wanted: str, place: Place, why: str) -> None:
    with pytest.raises(NoProvider, match=why):
        choose(wanted, place)


@pytest.mark.parametrize(
    ("device", "variable", "value", "refused"),
    [
        ("cuda", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", True),
        ("cuda", "PYTORCH_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:true", True),
        ("npu", "PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", True),
        ("npu", "PYTORCH_NPU_ALLOC_CONF", "expandable_segments:False", False),
        ("npu", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", False),
        ("cuda", "PYTORCH_CUDA_ALLOC_CONF", "", False),
    ],
)
def test_device_ipc_and_expandable_segments(device: str, variable: str, value: str, refused: bool) -> None:
    place = Place(device, own_sidecar=True, environment={variable: value})  # type: ignore[arg-type]
    why = PROVIDERS["device_ipc"].lacking(place)
    assert (f"set {variable}=expandable_segments:False" in why) is refused

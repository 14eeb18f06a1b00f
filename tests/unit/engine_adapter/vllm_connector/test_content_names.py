"""Blocks have one name in every process where their KV is the same, and never one where anything differs."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.vllm_connector.content_names import Chain, Item, items_of, root_of

TOKENS = list(range(100, 164))


def names(tokens: list[int] = TOKENS, items: tuple[Item, ...] = (), num_blocks: int = 4, **differs: Any) -> list[bytes]:
    of: dict[str, Any] = {"computation": "c", "block_size": 16, "cache_salt": None, "lora": (), "generation": ""}
    of |= differs
    return Chain(root_of(**of), of["block_size"], items).upto(tokens, num_blocks)


def test_the_same_in_another_process() -> None:
    script = (
        "from engine_adapter.vllm_connector.content_names import *\n"
        "print(b''.join(Chain(root_of('c', 16, None, (), ''), 16).upto(list(range(100, 164)), 4)).hex())"
    )
    # The package needs vLLM, these two files don't: fake_vllm stands in.
    fake = "from tests.unit.engine_adapter.vllm_connector import fake_vllm; fake_vllm.install((0, 32))\n"
    done = subprocess.run([sys.executable, "-c", fake + script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == b"".join(names()).hex()


@pytest.mark.parametrize(
    "differs",
    [
        {"computation": "another"},
        {"cache_salt": "tenant"},
        {"cache_salt": ""},
        {"lora": ("adapter", "f1")},
        {"lora": ("adapter", "f2")},
        {"generation": "after"},
        {"tokens": [99, *TOKENS[1:]]},
        {"items": (Item("image", 3, 5),)},
        {"items": (Item("another", 3, 5),)},
        {"items": (Item("image", 4, 5),)},
        {"items": (Item("image", 3, 6),)},
    ],
)
def test_a_difference_at_the_beginning_changes_every_name(differs: dict[str, Any]) -> None:
    assert not set(names(**differs)) & set(names())


def test_all_these_differ_from_each_other_too() -> None:
    salted = [names(cache_salt=salt)[0] for salt in (None, "", "None", "null")]
    adapted = [names(lora=lora)[0] for lora in (("a", "b"), ("ab",), ("a,b",), ('a", "b',))]
    pictured = [names(items=(Item(n, o, 2),))[0] for n, o in (("x", 1), ("x", 11), ("x1", 1))]
    assert len({*salted, *adapted, *pictured}) == 11


def test_a_block_is_named_by_everything_before_it() -> None:
    other = names([*TOKENS[:40], 7, *TOKENS[41:]])
    assert [here == there for here, there in zip(other, names(), strict=True)] == [True, True, False, False]
    late = names(items=(Item("image", 20, 20),))  # in blocks 1 and 2
    assert [here == there for here, there in zip(late, names(), strict=True)] == [True, False, False, False]
    spans = names(items=(Item("image", 0, 64),)), names(items=(Item("another", 0, 64),))
    assert not set(spans[0]) & set(spans[1])


def test_names_are_made_as_far_as_tokens_are_known() -> None:
    chain = Chain(b"root", 16)
    assert len(chain.upto(TOKENS[:40], 4)) == 2
    assert chain.upto([*TOKENS[:47], -1], 3) == chain.hashes[:2]
    assert len(chain.upto(TOKENS, 4)) == 4
    assert chain.upto(TOKENS, 2) == chain.hashes[:2]


def asked(**more: Any) -> Any:
    return SimpleNamespace(**({"mm_features": [], "prompt_embeds": None, "pooling_params": None} | more))


def test_what_a_request_says_of_its_images() -> None:
    place = SimpleNamespace(offset=2, length=336)
    feature = SimpleNamespace(modality="image", identifier="hash", mm_hash="h", mm_position=place)
    assert items_of(asked()) == []
    (item,) = items_of(asked(mm_features=[feature])) or []
    assert (item.offset, item.length) == (2, 336) and "hash" in item.name


@pytest.mark.parametrize(
    "request_",
    [
        asked(prompt_embeds=object()),
        asked(pooling_params=object()),
        SimpleNamespace(),
        asked(mm_features=[SimpleNamespace(identifier=None)]),
    ],
)
def test_what_can_not_be_named_is_not(request_: Any) -> None:
    assert items_of(request_) is None

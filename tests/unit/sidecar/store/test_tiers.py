"""What every tier keeps to, whatever it is made of."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest

from sidecar.store.contract import Tier
from sidecar.store.keys import BlockKey
from sidecar.store.memory import MemoryTier
from sidecar.store.posix import PosixTier
from tests.unit.sidecar.store.conftest import MAX_BYTES, Observer

BLOCK_BYTES = 8192


def key_of(name: str, namespace: str = "n") -> BlockKey:
    """Unlike any other test's, for a tier that outlives one."""
    return BlockKey(
        hashlib.blake2b(namespace.encode(), digest_size=16).digest(), hashlib.sha256(name.encode()).digest()
    )


def block_of(name: str, num_bytes: int = BLOCK_BYTES) -> bytearray:
    return bytearray(random.Random(name).randbytes(num_bytes))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def test_what_was_put_is_got(tier: Tier, name: str) -> None:
    assert tier.put(key_of(name), block_of(name))
    assert tier.get(key_of(name), BLOCK_BYTES) == block_of(name)
    assert tier.fault() == ""


def test_what_was_not_put_is_a_miss(tier: Tier, name: str, observer: Observer) -> None:
    assert tier.get(key_of(name), BLOCK_BYTES) is None
    assert tier.has([key_of(name)], until_missing=False) == [False]
    assert not observer.errors


def test_presence_is_told_one_by_one(tier: Tier, name: str) -> None:
    keys = [key_of(f"{name}{index}") for index in range(4)]
    for index in (0, 1, 3):
        assert tier.put(keys[index], block_of(str(index)))
    assert tier.has(keys, until_missing=False) == [True, True, False, True]
    assert tier.has(keys, until_missing=True)[:3] == [True, True, False]
    assert tier.has([], until_missing=False) == []


def test_another_namespace_is_another_block(tier: Tier, name: str) -> None:
    assert tier.put(key_of(name), block_of(name))
    assert tier.get(key_of(name, "another model"), BLOCK_BYTES) is None


def test_a_block_of_another_size_is_a_miss(tier: Tier, name: str) -> None:
    assert tier.put(key_of(name), block_of(name))
    assert tier.get(key_of(name), BLOCK_BYTES // 2) is None
    assert tier.get(key_of(f"{name} absent"), BLOCK_BYTES * 2) is None


def test_what_was_got_is_the_readers_own(tier: Tier, name: str) -> None:
    """Evicted, overwritten or closed: the bytes in hand stay."""
    assert tier.put(key_of(name), block_of(name))
    block = tier.get(key_of(name), BLOCK_BYTES)
    for index in range(2 * MAX_BYTES // BLOCK_BYTES):
        tier.put(key_of(f"{name}{index}"), block_of(str(index)))
    assert block == block_of(name)


def test_many_threads_read_and_write_the_same_blocks(tier: Tier, name: str) -> None:
    names = [f"{name}{index}" for index in range(8)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            chosen = rng.choice(names)
            if rng.random() < 0.5:
                tier.put(key_of(chosen), block_of(chosen))
            elif tier.get(key_of(chosen), BLOCK_BYTES) not in (None, block_of(chosen)):
                wrong.append(chosen)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for chosen in names:
        assert tier.put(key_of(chosen), block_of(chosen))
        assert tier.get(key_of(chosen), BLOCK_BYTES) == block_of(chosen)


@pytest.mark.parametrize("kind", ["memory", "posix"])
def test_the_limit_holds_and_the_least_used_go(kind: str, tmp_path: Path, observer: Observer) -> None:
    if kind == "memory":
        tier: Tier = MemoryTier(MAX_BYTES, observer)
    else:
        tier = PosixTier(tmp_path / "store", MAX_BYTES, observer)
    for index in range(200):
        assert tier.put(key_of(str(index)), block_of(str(index)))
        assert tier.usage()[1] <= MAX_BYTES
    found = tier.has([key_of(str(index)) for index in range(200)], until_missing=False)
    assert observer.num_evicted == 200 - sum(found) > 0
    assert all(found[index] for index in range(199, 150, -1))
    assert not any(found[:50])
    assert not tier.put(key_of("too large"), bytearray(MAX_BYTES + 1))

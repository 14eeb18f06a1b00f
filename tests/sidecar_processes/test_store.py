"""The prefix store behind real sidecars: what one engine saved another finds, and what goes wrong is a miss."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from sidecar.protocol import StoreFound, StoreLoad, StoreLoadEnded, StoreLookup, StoreSave, StoreSaveEnded
from tests.sidecar_processes.harness import FakeEngine, Sidecar, eventually


def hashes(num_blocks: int, salt: str = "") -> list[bytes]:
    return [hashlib.sha256(f"{salt}{index}".encode()).digest() for index in range(num_blocks)]


class StoreEngine(FakeEngine):
    """A fake engine that uses the store."""

    def save(self, block_hashes: list[bytes], block_ids: list[int]) -> StoreSaveEnded:
        save_id = f"save-{time.monotonic_ns()}"
        self.client.ask_store(StoreSave(save_id, block_hashes, block_ids))
        event = self.wait(lambda event: isinstance(event, StoreSaveEnded) and event.save_id == save_id)
        assert isinstance(event, StoreSaveEnded)
        return event

    def load(self, block_hashes: list[bytes], block_ids: list[int], deadline_s: float = 10.0) -> StoreLoadEnded:
        load_id = f"load-{time.monotonic_ns()}"
        self.client.ask_store(StoreLoad(load_id, block_hashes, block_ids, deadline_s))
        event = self.wait(lambda event: isinstance(event, StoreLoadEnded) and event.load_id == load_id)
        assert isinstance(event, StoreLoadEnded)
        return event

    def find(self, block_hashes: list[bytes]) -> StoreFound:
        lookup_id = f"lookup-{time.monotonic_ns()}"
        self.client.ask_store(StoreLookup(lookup_id, block_hashes))
        event = self.wait(lambda event: isinstance(event, StoreFound) and event.lookup_id == lookup_id)
        assert isinstance(event, StoreFound)
        return event


def files_of(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.is_file() and path.parent.name != "tmp"]


MEMORY = ("--store-memory-bytes", "1MiB")


def test_another_engine_finds_what_one_saved_in_a_shared_directory(directory: Path) -> None:
    store = directory / "store"
    flags = ("--store-dir", str(store))
    keys = hashes(6)
    with Sidecar(directory, "a", "shm", *flags) as a, StoreEngine(a, seed=1) as writer:
        assert writer.client.hello.store == ("posix",)
        ended = writer.save(keys, [3, 1, 4, 15, 9, 2])
        assert (ended.num_blocks, ended.num_known, ended.message) == (6, 0, "")
        saved = [writer.block(block_id) for block_id in (3, 1, 4, 15, 9, 2)]
        eventually(lambda: len(files_of(store)) == 6)
        assert writer.save(keys, [3, 1, 4, 15, 9, 2]).num_known == 6
    with Sidecar(directory, "b", "shm", *flags, *MEMORY) as b, StoreEngine(b, seed=2) as reader:
        found = reader.find([*keys, *hashes(2, "other")])
        assert (found.num_blocks, found.tiers) == (6, {"posix": 6})
        ended_load = reader.load([*keys, *hashes(2, "other")], [10, 11, 12, 13, 14, 15, 16, 17])
        assert (ended_load.num_blocks, ended_load.bad_block_ids, ended_load.reason) == (6, [16, 17], "missing")
        assert ended_load.tiers == {"posix": 6}
        assert [reader.block(block_id) for block_id in range(10, 16)] == saved
        again = reader.load(keys, [20, 21, 22, 23, 24, 25])
        assert (again.num_blocks, again.reason, again.tiers) == (6, "", {"memory": 6})
        assert [reader.block(block_id) for block_id in range(20, 26)] == saved
        assert reader.find(keys).tiers == {"memory": 6}
        assert b.metric('baton_sidecar_store_hits_total{tier="posix"}') == 6
        assert b.metric('baton_sidecar_store_loads_total{outcome="ok"}') == 1

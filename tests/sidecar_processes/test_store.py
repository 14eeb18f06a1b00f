"""The prefix store behind real sidecars: what one engine saved another finds, and what goes wrong is a miss."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from sidecar.protocol import (
    Plane,
    StoreAbandon,
    StoreFound,
    StoreLoad,
    StoreLoadEnded,
    StoreLookup,
    StoreSave,
    StoreSaveEnded,
)  # fmt: skip
from sidecar.transport import mooncake
from tests.sidecar_processes.harness import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    ROOT,
    EngineProcess,
    FakeEngine,
    Sidecar,
    a_layout,
    eventually,
    paused,
)  # fmt: skip
from tests.unit.sidecar.store.conftest import Master


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
        eventually(lambda: a.metric('baton_sidecar_store_written_blocks_total{tier="posix"}') == 6)
        assert len(files_of(store)) == 6
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


def test_memory_outlives_the_engine(directory: Path) -> None:
    with Sidecar(directory, "a", "shm", *MEMORY) as a:
        with StoreEngine(a, seed=1) as first:
            assert first.save(hashes(4), [0, 1, 2, 3]).num_blocks == 4
            saved = [first.block(block_id) for block_id in range(4)]
        with StoreEngine(a, seed=2) as second:
            assert second.load(hashes(4), [9, 8, 7, 6]).num_blocks == 4
            assert [second.block(block_id) for block_id in (9, 8, 7, 6)] == saved


def test_planes_are_gathered_and_scattered(directory: Path) -> None:
    """Blocks in two pieces, at other places in the other pool."""
    here = a_layout(planes=(Plane(0, 4096, 4096), Plane(NUM_BLOCKS * 4096, 4096, 4096)))
    there = a_layout(planes=(Plane(NUM_BLOCKS * 8192, 4096, 4096), Plane(0, 8192, 4096)))
    with Sidecar(directory, "a", "shm", *MEMORY) as a:
        with StoreEngine(a, here, seed=1) as first:
            first.save(hashes(1), [5])
            saved = first.pool[5 * 4096 : 6 * 4096], first.pool[(NUM_BLOCKS + 5) * 4096 : (NUM_BLOCKS + 6) * 4096]
        with StoreEngine(a, there, seed=2) as second:
            assert second.load(hashes(1), [7]).num_blocks == 1
            start = NUM_BLOCKS * 8192 + 7 * 4096
            assert (second.pool[start : start + 4096], second.pool[7 * 8192 : 7 * 8192 + 4096]) == saved


@pytest.mark.parametrize(
    "changes", [{"model": "another"}, {"dtype": "bfloat16"}, {"block_size": 8}, {"order": "another"}], ids=str
)
def test_another_model_finds_nothing(directory: Path, changes: dict[str, object]) -> None:
    flags = ("--store-dir", str(directory / "store"), *MEMORY)
    with Sidecar(directory, "a", "shm", *flags) as a:
        with StoreEngine(a, seed=1) as first:
            first.save(hashes(4), [0, 1, 2, 3])
            eventually(lambda: len(files_of(directory / "store")) == 4)
        with StoreEngine(a, a_layout(**changes), seed=2) as second:
            before = bytes(second.pool)
            assert second.find(hashes(4)).num_blocks == 0
            ended = second.load(hashes(4), [0, 1, 2, 3])
            assert (ended.num_blocks, ended.bad_block_ids, ended.reason) == (0, [0, 1, 2, 3], "missing")
            assert second.pool[:] == before


def test_another_rank_finds_nothing(directory: Path) -> None:
    flags = ("--store-dir", str(directory / "store"))
    with Sidecar(directory, "a", "shm", *flags, "--rank", "0") as a, StoreEngine(a) as first:
        first.save(hashes(2), [0, 1])
    assert len(files_of(directory / "store")) == 2, "what was saved is written before the sidecar ends"
    with Sidecar(directory, "b", "shm", *flags, "--rank", "1") as b, StoreEngine(b) as second:
        assert second.find(hashes(2)).num_blocks == 0


def test_a_spoilt_file_is_a_miss_and_what_precedes_it_is_loaded(directory: Path) -> None:
    store = directory / "store"
    flags = ("--store-dir", str(store))
    keys = hashes(5)
    with Sidecar(directory, "a", "shm", *flags) as a, StoreEngine(a, seed=1) as first:
        first.save(keys, [0, 1, 2, 3, 4])
        saved = first.pool[: 5 * 8192]
        eventually(lambda: len(files_of(store)) == 5)
        torn = next(path for path in files_of(store) if path.name == keys[3].hex())
        torn.write_bytes(torn.read_bytes()[:-100])
        with Sidecar(directory, "b", "shm", *flags) as b, StoreEngine(b, seed=2) as second:
            ended = second.load(keys, [10, 11, 12, 13, 14])
            assert (ended.num_blocks, ended.bad_block_ids) == (3, [13, 14])
            assert second.pool[10 * 8192 : 13 * 8192] == saved[: 3 * 8192]
            assert b.metric('baton_sidecar_store_errors_total{kind="torn",tier="posix"}') == 1
            assert second.find(keys).num_blocks == 3


def test_a_writer_killed_in_the_middle_of_a_save(directory: Path) -> None:
    """Every block that is found afterwards is whole, the others are misses, and the saver is told."""
    store = directory / "store"
    flags = ("--store-dir", str(store))
    layout = a_layout(num_blocks=128, block_bytes=128 << 10)
    keys = hashes(128)
    with Sidecar(directory, "a", "shm", *flags) as a, StoreEngine(a, layout, seed=1) as writer:
        writer.client.ask_store(StoreSave("save", keys, list(range(128))))
        eventually(lambda: len(files_of(store)) >= 5)
        a.kill()
        writer.wait(lambda event: isinstance(event, StoreSaveEnded) and event.save_id == "save")
        with Sidecar(directory, "b", "shm", *flags) as b, StoreEngine(b, layout, seed=2) as reader:
            found = [index for index in range(128) if reader.load([keys[index]], [index]).num_blocks]
            assert 5 <= len(found) < 128, "it was killed in the middle"
            size = layout.block_bytes
            assert all(reader.pool[i * size : (i + 1) * size] == writer.pool[i * size : (i + 1) * size] for i in found)
            assert "store_bad_block" not in b.log_path.read_text()
            writer_again = reader.save(keys, list(range(128)))
            assert writer_again.num_blocks + writer_again.num_known == 128


def test_an_engine_killed_in_the_middle_of_a_save(directory: Path) -> None:
    with Sidecar(directory, "a", "shm", *MEMORY, "--copy-bytes-per-s", str(1 << 20)) as a:
        with EngineProcess(a) as engine:
            engine.save(hashes(128), list(range(128)))
            eventually(lambda: a.metric("baton_sidecar_registered_bytes") > 0)
        eventually(lambda: a.metric("baton_sidecar_registered_bytes") == 0)
        with StoreEngine(a, seed=2) as second:
            num_found = second.find(hashes(128)).num_blocks
            assert second.load(hashes(num_found), list(range(num_found))).num_blocks == num_found
            assert set(second.pool[: num_found * 8192]) <= {7}
            assert a.metric("baton_sidecar_open_pulls") == 0


def test_a_load_ends_by_its_deadline_and_writes_nothing_afterwards(directory: Path) -> None:
    store = directory / "store"
    with Sidecar(directory, "a", "shm", "--store-dir", str(store)) as a, StoreEngine(a, seed=1) as engine:
        engine.save(hashes(2), [0, 1])
        eventually(lambda: len(files_of(store)) == 2)
        ended = engine.load(hashes(2), [10, 11], deadline_s=0.0)
        assert ended.reason in ("timeout", "")
        assert ended.bad_block_ids == [10, 11][ended.num_blocks :]


def test_an_abandoned_load_still_ends_once(directory: Path) -> None:
    with Sidecar(directory, "a", "shm", *MEMORY) as a, StoreEngine(a, seed=1) as engine:
        engine.save(hashes(64), list(range(64)))
        for number in range(20):
            engine.client.ask_store(StoreLoad(f"load{number}", hashes(64), list(range(64, 128)), 5.0))
            engine.client.ask_store(StoreAbandon(f"load{number}"))
        for number in range(20):
            engine.wait(lambda event, n=number: isinstance(event, StoreLoadEnded) and event.load_id == f"load{n}")  # type: ignore[misc]
        engine.events += engine.client.poll()
        ended = [event.load_id for event in engine.events if isinstance(event, StoreLoadEnded)]
        assert sorted(ended) == sorted(f"load{number}" for number in range(20))


@pytest.mark.parametrize(
    ("block_hashes", "block_ids", "why"),
    [
        (hashes(2), [0], "2 hashes for 1 blocks"), (hashes(1), [NUM_BLOCKS], "not in the pool"),
        (hashes(2), [3, 3], "occurs twice"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    directory: Path, block_hashes: list[bytes], block_ids: list[int], why: str
) -> None:
    with Sidecar(directory, "a", "shm", *MEMORY) as a, StoreEngine(a, seed=1) as engine:
        before = bytes(engine.pool)
        saved = engine.save(block_hashes, block_ids)
        assert (saved.num_blocks, why in saved.message) == (0, True)
        loaded = engine.load(block_hashes, block_ids)
        assert (loaded.num_blocks, loaded.reason, loaded.bad_block_ids) == (0, "invalid", block_ids)
        assert why in loaded.message
        assert engine.pool[:] == before
        assert engine.save(hashes(1), [0]).num_blocks == 1, "the connection lives on"


def test_a_process_that_joined_may_look_up_and_nothing_else(directory: Path) -> None:
    with Sidecar(directory, "a", "shm", *MEMORY) as a, StoreEngine(a, seed=1) as engine:
        engine.save(hashes(2), [0, 1])
        joined = StoreEngine.__new__(StoreEngine)
        joined.events = []
        joined._happened = threading.Event()
        joined.client = SidecarClient.connect(a.socket_path, on_event=joined._happened.set)
        joined.client.join_pool()
        assert joined.find(hashes(2)).num_blocks == 2
        assert joined.load(hashes(2), [2, 3]).reason == "invalid"
        assert "only the process" in joined.save(hashes(2), [2, 3]).message
        joined.client.close()


def test_a_sidecar_without_a_store_says_so(directory: Path) -> None:
    with Sidecar(directory, "a", "shm") as a, StoreEngine(a) as engine:
        assert engine.client.hello.store == ()
        assert engine.find(hashes(1)).num_blocks == 0
        assert engine.load(hashes(1), [0]).message == "this sidecar has no store"
        assert engine.save(hashes(1), [0]).message == "this sidecar has no store"


def test_a_sidecar_that_dies_ends_what_was_asked_of_it(directory: Path) -> None:
    with Sidecar(directory, "a", "shm", *MEMORY) as a, StoreEngine(a) as engine:
        with paused(a.process.pid):
            engine.client.ask_store(StoreLoad("load", hashes(1), [0], 5.0))
            engine.client.ask_store(StoreSave("save", hashes(1), [0]))
            engine.client.ask_store(StoreLookup("lookup", hashes(1)))
            a.process.kill()
        load = engine.wait(lambda event: isinstance(event, StoreLoadEnded))
        assert isinstance(load, StoreLoadEnded) and load.reason == "sidecar_lost" and load.bad_block_ids == [0]
        engine.wait(lambda event: isinstance(event, StoreSaveEnded))
        engine.wait(lambda event: isinstance(event, StoreFound))


def test_the_health_page_names_a_tier_that_is_out_and_stays_green(directory: Path) -> None:
    mount = directory / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with Sidecar(directory, "a", "shm", "--store-dir", f"{mount}/store") as a, StoreEngine(a, seed=1) as engine:
            engine.save(hashes(NUM_BLOCKS), list(range(NUM_BLOCKS)))

            def is_out() -> bool:
                """Saving again what was refused, for when the pause between two tries is over just now."""
                engine.save(hashes(NUM_BLOCKS), list(range(NUM_BLOCKS)))
                status, page = a.get("/healthz")
                assert status == 200
                return "No space left" in page and a.metric('baton_sidecar_store_tier_up{tier="posix"}') == 0

            eventually(is_out, 30)
            assert a.metric('baton_sidecar_store_errors_total{kind="full",tier="posix"}') >= 1
            eventually(lambda: a.metric("baton_sidecar_store_queued_bytes") == 0, 30)
            # One by one: which blocks met the full disk is up to its two writers, and a busy machine.
            keys, saved = hashes(NUM_BLOCKS), bytes(engine.pool)
            found = {index for index in range(NUM_BLOCKS) if engine.find([keys[index]]).num_blocks}
            assert 20 < len(found) < NUM_BLOCKS
            engine.fill(0)
            loaded = {index for index in range(NUM_BLOCKS) if engine.load([keys[index]], [index]).num_blocks}
            assert loaded == found
            for index in range(NUM_BLOCKS):
                there = saved[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] if index in found else bytes(BLOCK_BYTES)
                assert engine.block(index) == there, index
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.mooncake
@pytest.mark.skipif(bool(mooncake.missing()), reason=mooncake.missing() or "mooncake is there")
def test_mooncake_store_between_two_sidecars(directory: Path) -> None:
    """What one saved the other one finds, until the machine whose memory it was in has gone."""
    master = Master()
    flags = ("--store-mooncake", master.address, "--store-mooncake-segment-bytes")
    try:
        with (
            Sidecar(directory, "a", "shm", *flags, "64MiB") as a,
            Sidecar(directory, "b", "shm", *flags, "0") as b,
            StoreEngine(a, seed=1) as writer,
            StoreEngine(b, seed=2) as reader,
        ):
            assert writer.client.hello.store == ("mooncake",)
            assert writer.save(hashes(4), [0, 1, 2, 3]).num_blocks == 4
            eventually(lambda: a.metric('baton_sidecar_store_written_blocks_total{tier="mooncake"}') == 4, 30)
            loaded = reader.load(hashes(5), [10, 11, 12, 13, 14], deadline_s=20)
            assert (loaded.num_blocks, loaded.tiers, loaded.bad_block_ids) == (4, {"mooncake": 4}, [14])
            assert reader.pool[10 * 8192 : 14 * 8192] == writer.pool[: 4 * 8192]
            (pid,) = a.children()
            a.kill()
            eventually(lambda: not Path(f"/proc/{pid}").exists() or "Z" in status_of(pid))
            before = bytes(reader.pool)
            gone = reader.load(hashes(4), [20, 21, 22, 23], deadline_s=10)
            assert gone.num_blocks == 0 and reader.pool[:] == before
            master.kill()
            started_at = time.monotonic()
            assert reader.load(hashes(4), [20, 21, 22, 23], deadline_s=2).num_blocks == 0
            assert time.monotonic() - started_at < 10
            assert b.get("/healthz")[0] == 200
    finally:
        master.kill()


def status_of(pid: int) -> str:
    """The state of a process, "Z" where it has ended."""
    try:
        return Path(f"/proc/{pid}/status").read_text().split("State:")[1][:3]
    except FileNotFoundError:
        return "Z"


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (("--store-dir-bytes", "1GiB"), 2, ("--store-dir-bytes", "--store-dir:")),
        (("--store-dir", "relative"), 2, ("--store-dir relative", "absolute")),
        (("--store-dir", "/proc/baton"), 1, ("--store-dir /proc/baton", "can be written")),
        (("--store-memory-bytes", "many"), 2, ("'many' is no size", "2GiB")),
        (("--store-mooncake-segment-bytes", "1GiB"), 2, ("--store-mooncake HOST:PORT",)),
        (("--store-mooncake", "somewhere"), 2, ("HOST:PORT", "127.0.0.1:50051")),
        (("--store-dirs", "/tmp"), 2, ("did you mean --store-dir?",)),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_are_refused_at_the_start(
    directory: Path, flags: tuple[str, ...], status: int, words: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "sidecar.cli", "--socket", str(directory / "s"), "--engine-id", "e", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert ended.returncode == status, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert all(word in ended.stderr for word in words), ended.stderr

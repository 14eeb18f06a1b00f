"""A shared directory as it goes wrong: torn, foreign, full, raced. A miss or a refusal, never a wrong byte."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.errors import StartError
from sidecar.store import posix
from sidecar.store.backoff import Backoff
from sidecar.store.directory_space import STALE_TEMPORARY_S
from sidecar.store.posix import PosixTier
from sidecar.store.sealed_block import HEADER_BYTES, header_of
from tests.unit.sidecar.store.conftest import Observer
from tests.unit.sidecar.store.test_tiers import BLOCK_BYTES, block_of, key_of

ROOT = Path(__file__).resolve().parents[4]
LIMIT = 64 << 20
KEY = key_of("kept")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def tier(store: Path, observer: Observer) -> PosixTier:
    tier = PosixTier(store, LIMIT, observer)
    assert tier.put(KEY, block_of("kept"))
    return tier


def flip(path: Path, position: int) -> None:
    sealed = bytearray(path.read_bytes())
    sealed[position] ^= 1
    path.write_bytes(sealed)


SPOILERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": ("torn", lambda path: path.write_bytes(b"")),
    "cut in the header": ("torn", lambda path: path.write_bytes(path.read_bytes()[: HEADER_BYTES - 3])),
    "header alone": ("torn", lambda path: path.write_bytes(path.read_bytes()[:HEADER_BYTES])),
    "cut in the block": ("torn", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "too long": ("torn", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "first bit": ("foreign", lambda path: flip(path, 0)),
    "hash": ("mismatch", lambda path: flip(path, 40)),
    "checksum": ("corrupt", lambda path: flip(path, HEADER_BYTES - 1)),
    "first byte": ("corrupt", lambda path: flip(path, HEADER_BYTES)),
    "last byte": ("corrupt", lambda path: flip(path, -1)),
    "zeros after a crash": (
        "foreign", lambda path: path.write_bytes(bytes(HEADER_BYTES + BLOCK_BYTES)),
    ),
    "half a page of zeros": (
        "corrupt", lambda path: path.write_bytes(path.read_bytes()[:-2048] + bytes(2048)),
    ),
    "another model's": (
        "mismatch",
        lambda path: path.write_bytes(header_of(key_of("kept", "model 2"), block_of("kept")) + block_of("kept")),
    ),
    "another block": ("mismatch", lambda path: path.write_bytes(header_of(key_of("o"), block_of("o")) + block_of("o"))),
}  # fmt: skip


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_spoilt_file_is_a_miss_counted_and_removed(
    spoiler: str, tier: PosixTier, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    kind, spoil = SPOILERS[spoiler]
    spoil(tier.path_of(KEY))
    assert tier.get(KEY, BLOCK_BYTES) is None
    assert observer.errors == {kind: 1}
    assert f"kind={kind}" in caplog.text
    assert not tier.path_of(KEY).exists()
    assert tier.put(KEY, block_of("kept"))
    assert tier.get(KEY, BLOCK_BYTES) == block_of("kept")


def test_every_flipped_byte_of_a_header_is_found(tier: PosixTier) -> None:
    sealed = tier.path_of(KEY).read_bytes()
    for position in range(HEADER_BYTES):
        if not tier.path_of(KEY).exists():
            tier.path_of(KEY).write_bytes(sealed)
        flip(tier.path_of(KEY), position)
        assert tier.get(KEY, BLOCK_BYTES) is None, position


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_bad_file_of_another_user_is_left_and_not_found_again(tier: PosixTier, observer: Observer) -> None:
    path = tier.path_of(KEY)
    flip(path, -1)
    os.chown(path, 65534, 65534)
    assert tier.get(KEY, BLOCK_BYTES) is None
    assert path.exists()
    assert tier.has([KEY], until_missing=True) == [False]
    assert observer.errors == {"corrupt": 1}


def test_what_is_no_file_is_a_miss(tier: PosixTier, tmp_path: Path, observer: Observer) -> None:
    path = tier.path_of(KEY)
    kept = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    assert tier.get(KEY, BLOCK_BYTES) is None  # and does not wait for a writer
    assert tier.has([KEY], until_missing=True) == [False]
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(kept)
    path.symlink_to(tmp_path / "elsewhere")
    assert tier.get(KEY, BLOCK_BYTES) is None
    path.unlink()
    path.mkdir()
    assert tier.get(KEY, BLOCK_BYTES) is None
    assert observer.errors["read"] + observer.errors["foreign"] == 3


def test_two_writers_of_one_block_and_a_reader(store: Path, observer: Observer) -> None:
    """Over and over, in two tiers as in two machines: every read is whole or nothing."""
    one, two = PosixTier(store, LIMIT, observer), PosixTier(store, LIMIT, observer)
    stop = threading.Event()
    seen: list[bytearray | None] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(one.get(KEY, BLOCK_BYTES))

    def write(tier: PosixTier) -> None:
        for _ in range(50):
            assert tier.put(KEY, block_of("kept"))
            tier.path_of(KEY).unlink(missing_ok=True)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(tier,)) for tier in (one, two)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert {bytes(block) for block in seen if block is not None} <= {bytes(block_of("kept"))}
    assert not observer.errors
    assert not list((store / "tmp").iterdir())


def test_eviction_while_reading(store: Path, observer: Observer) -> None:
    """One reads what the other evicts: whole or a miss."""
    small = 40 * (BLOCK_BYTES + HEADER_BYTES)
    writer, reader = PosixTier(store, small, observer), PosixTier(store, small, observer)
    stop = threading.Event()
    wrong: list[int] = []
    num_read = 0

    def read() -> None:
        nonlocal num_read
        rng = random.Random(1)
        while not stop.is_set():
            index = rng.randrange(300)
            block = reader.get(key_of(str(index)), BLOCK_BYTES)
            num_read += block is not None
            if block not in (None, block_of(str(index))):
                wrong.append(index)

    thread = threading.Thread(target=read)
    thread.start()
    for index in range(300):
        assert writer.put(key_of(str(index)), block_of(str(index)))
    stop.set()
    thread.join()
    assert not wrong
    assert not observer.errors
    assert observer.num_evicted > 200


def test_several_writers_share_one_limit(store: Path, observer: Observer) -> None:
    """Nobody tells the others, but a sweep sees what they wrote: at most a 16th each above it."""
    limit = 160 * (BLOCK_BYTES + HEADER_BYTES)
    tiers = [PosixTier(store, limit, observer) for _ in range(3)]
    for index in range(600):
        assert tiers[index % 3].put(key_of(str(index)), block_of(str(index)))
    used = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert limit / 2 < used <= limit * (1 + 3 / 16)


def test_what_is_read_is_kept_longest(store: Path, observer: Observer) -> None:
    tier = PosixTier(store, 10 * (BLOCK_BYTES + HEADER_BYTES), observer)
    long_ago = time.time() - 10 * posix.TOUCH_AFTER_S
    for index in range(10):
        assert tier.put(key_of(str(index)), block_of(str(index)))
        os.utime(tier.path_of(key_of(str(index))), (long_ago + index, long_ago + index))
    assert tier.get(key_of("0"), BLOCK_BYTES) is not None
    assert tier.put(key_of("new"), block_of("new"))
    found = tier.has([key_of(str(index)) for index in range(10)], until_missing=False)
    assert found[0] and not found[1]


def test_what_a_dead_writer_left_is_removed_in_time(store: Path, observer: Observer) -> None:
    tier = PosixTier(store, LIMIT, observer)
    old, young = store / "tmp" / "old", store / "tmp" / "young"
    for path in (old, young):
        path.write_bytes(b"half a block")
    os.utime(old, (time.time() - 2 * STALE_TEMPORARY_S,) * 2)
    assert tier.put(KEY, block_of("kept"))
    assert young.exists() and not old.exists()


def test_a_directory_that_cannot_be_used_is_said_at_the_start(tmp_path: Path, observer: Observer) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "absent" / "store"):
        with pytest.raises(StartError, match=r"--store-dir .*; give a directory"):
            PosixTier(root, LIMIT, observer)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_failed_write_is_not_tried_again_at_once(
    tier: PosixTier, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    tier._writes = Backoff(clock)
    tries = 0

    def full(fd: int) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for index in range(5):
            assert not tier.put(key_of(f"new{index}"), block_of("new"))
        assert (tries, observer.errors["full"]) == (1, 1)
        assert "No space left" in tier.fault()
        assert tier.get(KEY, BLOCK_BYTES) == block_of("kept")
        clock.now = 1.1
        assert not tier.put(key_of("new"), block_of("new"))
        clock.now = 2.5  # the second pause is twice as long
        assert not tier.put(key_of("new"), block_of("new"))
        assert tries == 2
    clock.now = 3.5
    assert tier.put(key_of("new"), block_of("new"))
    assert tier.fault() == ""
    assert not list((tier._root / "tmp").iterdir())


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_ends_writing_and_not_reading(full_disk: Path, observer: Observer) -> None:
    tier = PosixTier(full_disk / "store", LIMIT, observer)
    taken = [index for index in range(200) if tier.put(key_of(str(index)), block_of(str(index)))]
    assert 50 < len(taken) < 150
    assert observer.errors == {"full": 1}
    for index in taken:
        assert tier.get(key_of(str(index)), BLOCK_BYTES) == block_of(str(index))
    assert not list((full_disk / "store" / "tmp").iterdir())


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """For where nothing can be mounted: the kernel stops the write in the middle of a block."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from sidecar.store.posix import PosixTier\n"
        "from tests.unit.sidecar.store.conftest import Observer\n"
        "from tests.unit.sidecar.store.test_tiers import *\n"
        "observer = Observer(); tier = PosixTier(Path(sys.argv[1]), 1 << 20, observer)\n"
        "assert tier.put(key_of('before'), block_of('before'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "assert not tier.put(key_of('after'), block_of('after'))\n"
        "assert observer.errors == {'full': 1}, observer.errors\n"
        "assert tier.get(key_of('before'), BLOCK_BYTES) == block_of('before')\n"
        "assert tier.get(key_of('after'), BLOCK_BYTES) is None\n"
        "assert not list((Path(sys.argv[1]) / 'tmp').iterdir())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], check=True, cwd=ROOT, timeout=60)

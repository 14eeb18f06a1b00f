from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.regions import Region, allocate, boot_id, forbid_shrinking, reopen_read_only, size_of

SIZE = 1 << 20


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def mapped(fd: int) -> int:
    """How often the memory behind `fd` is mapped here."""
    inode = os.fstat(fd).st_ino
    return sum(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines())


def test_two_mappings_share_their_bytes_and_closing_unmaps(memory: int) -> None:
    writer, reader = Region(memory, SIZE, writable=True), Region(memory, SIZE, writable=False)
    ctypes.memmove(writer.address + 5, b"hello", 5)
    assert ctypes.string_at(reader.address + 5, 5) == b"hello"
    assert mapped(memory) == 2
    for region in (writer, reader, reader):
        region.close()
    assert mapped(memory) == 0


@pytest.mark.parametrize("kernel_can", [True, False])
def test_pages_are_faulted_in_before_their_first_touch(
    memory: int, kernel_can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_can:
        monkeypatch.setattr("sidecar.regions._MADV_POPULATE_READ", 9999)
    os.pwrite(memory, b"last", SIZE - 4)
    region = Region(memory, SIZE, writable=False, faulted_in=False)
    could = region.fault_in(SIZE - 8192, SIZE)
    assert kernel_can or not could
    assert ctypes.string_at(region.address + SIZE - 4, 4) == b"last"
    region.close()


def test_a_mapping_that_is_kept_here_is_not_in_a_child(memory: int) -> None:
    region = Region(memory, SIZE, writable=False)
    for expected in (1, 0):
        child = os.fork()
        if child == 0:
            os._exit(mapped(memory))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected
        region.keep_here()
    region.close()


def test_a_large_mapping_is_undone_in_pieces(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.regions._UNMAP_BYTES", 3 * 4096)
    region = Region(memory, SIZE - 4096, writable=False)
    assert mapped(memory) == 1
    region.close()
    region.close()
    assert mapped(memory) == 0


def test_memory_that_cannot_be_mapped_is_an_error(memory: int) -> None:
    read_only = reopen_read_only(memory)
    try:
        with pytest.raises(OSError, match="cannot map"):
            Region(read_only, SIZE, writable=True)
        Region(read_only, SIZE, writable=False).close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(read_only, b"x")
    finally:
        os.close(read_only)


def test_memory_is_allocated_before_it_is_touched_where_it_can_be(memory: int) -> None:
    assert os.fstat(memory).st_blocks == 0
    allocate(memory, SIZE)
    assert os.fstat(memory).st_blocks * 512 == SIZE
    read_only = reopen_read_only(memory)
    allocate(read_only, SIZE)  # left to the mapping to refuse
    os.close(read_only)


def test_sealed_memory_cannot_shrink(memory: int) -> None:
    assert size_of(memory) == SIZE
    assert forbid_shrinking(memory)
    with pytest.raises(PermissionError):
        os.ftruncate(memory, 10)


def test_memory_made_without_seals_says_so() -> None:
    fd = os.memfd_create("plain")
    assert not forbid_shrinking(fd)
    os.close(fd)


def test_one_boot_one_id() -> None:
    assert boot_id() == boot_id() and len(boot_id()) == 36

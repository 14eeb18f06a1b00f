"""How much host memory this process may still take: the machine's and its control group's, whichever is less."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED_BYTES = 1 << 60
"""Version 1 control groups say "no limit" by a number near 2**63."""


def available_host_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """None where neither the kernel nor a control group tells (not Linux)."""
    known = [
        available
        for available in (_mem_available_bytes(proc), _cgroup2_bytes(proc, cgroup), _cgroup1_bytes(cgroup))
        if available is not None
    ]
    return min(known) if known else None


def _mem_available_bytes(proc: Path) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup2_bytes(proc: Path, cgroup: Path) -> int | None:
    """The tightest limit between this process's group and the root; memory that is only page cache counts as free."""
    path = next((line[3:] for line in _read(proc / "self/cgroup").splitlines() if line.startswith("0::")), "/")
    group = cgroup / path.strip("/")
    available: int | None = None
    for directory in (group, *group.parents):
        limit, used = _read(directory / "memory.max").strip(), _read(directory / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            left = max(0, int(limit) - int(used) + _inactive_file_bytes(directory, "inactive_file"))
            available = left if available is None else min(available, left)
        if directory == cgroup:
            break
    return available


def _cgroup1_bytes(cgroup: Path) -> int | None:
    directory = cgroup / "memory"
    limit = _read(directory / "memory.limit_in_bytes").strip()
    used = _read(directory / "memory.usage_in_bytes").strip()
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= _UNLIMITED_BYTES:
        return None
    return max(0, int(limit) - int(used) + _inactive_file_bytes(directory, "total_inactive_file"))


def _inactive_file_bytes(directory: Path, key: str) -> int:
    for line in _read(directory / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

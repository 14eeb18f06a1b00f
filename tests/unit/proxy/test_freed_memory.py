"""Memory that large bodies leave is kept while they come, and given back afterwards."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from proxy import freed_memory
from proxy.freed_memory import IDLE_S, KEPT_BYTES, FreedMemory

SCRIPT = """
import psutil
from proxy.freed_memory import FreedMemory, IDLE_S
memory = FreedMemory()
memory.keep()
process = psutil.Process()
small = [bytes(1000) for _ in range(1000)]
before = process.memory_info().rss
body = [b"x" * (11 << 20) for _ in range(4)]
beside = bytes(2000)
del body
memory.tick(0.0)
memory.tick(IDLE_S / 2)
kept = process.memory_info().rss - before
memory.tick(IDLE_S + 1.0)
print(kept, process.memory_info().rss - before)
"""


def test_it_is_kept_and_then_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    kept, left = map(int, done.stdout.split())
    assert KEPT_BYTES > kept > 40 << 20, "the next body finds it"
    assert left < 8 << 20


def test_while_large_bodies_come_and_go_nothing_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FreedMemory()
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "_trim", trimmed.append)
    free = [0]
    monkeypatch.setattr(memory, "_info", lambda: freed_memory._Mallinfo2(fordblks=free[0]))
    for second in range(60):
        free[0] = (20 + 10 * (second % 3)) << 20
        memory.tick(float(second))
    assert not trimmed
    for second in range(60, 60 + int(IDLE_S) + 3):
        memory.tick(float(second))
    assert trimmed == [0]


def test_a_tick_costs_next_to_nothing() -> None:
    memory = FreedMemory()
    begun = time.process_time()
    for _ in range(1000):
        memory.tick(0.0)
    assert (time.process_time() - begun) / 1000 < 5e-3, "once a second, in a process with a large heap too"

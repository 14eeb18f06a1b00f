"""The engine process's pure parts, and its loop with a fake engine; the real one runs in tests/sidecar_processes."""

from __future__ import annotations

import queue
import random
import sys
from typing import Any

import pytest

from sidecar.protocol import Message
from sidecar.transport import mooncake
from sidecar.transport.mooncake import (
    MAX_SPAN_BYTES,
    MAX_SPANS,
    CopyEnded,
    EngineFault,
    Read,
    Start,
    Stop,
    _Job,
    _Reader,
)


def test_batches_cover_every_byte_once_within_the_limits() -> None:
    dice = random.Random(3)
    spans, at = [], 0
    for _ in range(3000):
        length = dice.choice([1, 4096, 70_000, 3_000_000])
        spans.append((at + 7, at, length))
        at += length
    job = _Job(Read(1, spans))
    covered = 0
    while job.spans:
        batch = job.next_batch(16 << 20)
        assert 0 < len(batch) <= MAX_SPANS and sum(length for _, _, length in batch) <= 16 << 20
        for remote, local, length in batch:
            assert (remote, local) == (covered + 7, covered) and 0 < length <= MAX_SPAN_BYTES
            covered += length
    assert covered == at


class FakeEngine:
    """Counts calls; fails when told."""

    def __init__(self, submit: int = 5, status: int = 0) -> None:
        self.submit, self.status = submit, status
        self.batches: list[int] = []
        self.asked: list[int] = []

    def batch_transfer_async_read(self, session: str, local: list[int], remote: list[int], sizes: list[int]) -> int:
        assert session == "host:1" and len(local) == len(remote) == len(sizes) <= MAX_SPANS
        assert min(local) >= 1_000_000 and min(remote) >= 2_000_000
        self.batches.append(sum(sizes))
        return self.submit

    def get_batch_transfer_status(self, ids: list[int]) -> int:
        self.asked += ids
        return self.status


class Finished(Exception):
    """Nothing is left to copy."""


class Inbox(queue.SimpleQueue):  # type: ignore[type-arg]
    def get(self, *arguments: Any, **options: Any) -> Any:
        if self.empty():
            raise Finished
        return super().get(*arguments, **options)


def run(engine: FakeEngine, *messages: Message) -> list[Message]:
    inbox, sent = Inbox(), list[Message]()
    for message in messages:
        inbox.put(message)
    start = Start(0, 1, "h", "tcp", "", "host:1", 2_000_000)
    try:
        _Reader(engine, start, 1_000_000, inbox).run(sent.append)
    except Finished:
        return sent
    raise AssertionError("it never ends by itself")


def test_copies_take_turns() -> None:
    engine = FakeEngine()
    long = Read(1, [(0, 0, 40 << 20)])
    assert run(engine, long, Read(2, [(0, 0, 100)])) == [CopyEnded(2, True), CopyEnded(1, True)]
    assert engine.batches == [16 << 20, 100, 16 << 20, 8 << 20]


def test_a_stopped_copy_submits_no_more() -> None:
    engine = FakeEngine()
    assert run(engine, Read(1, [(0, 0, 40 << 20)]), Stop(1), Stop(9)) == [CopyEnded(1, False)]
    assert engine.batches == []


def test_a_batch_that_was_not_taken_is_never_asked_about() -> None:
    engine = FakeEngine(submit=0)
    with pytest.raises(EngineFault, match="refused a batch"):
        run(engine, Read(1, [(0, 0, 1)]))
    assert engine.asked == []


def test_a_failed_batch_ends_the_process() -> None:
    with pytest.raises(EngineFault, match="status -1"):
        run(FakeEngine(status=-1), Read(1, [(0, 0, 1)]))


def test_what_is_missing_is_a_sentence_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "LIBRARIES", {"libnothing.so.9": "libnothing9", "libc.so.6": "libc6"})
    monkeypatch.setattr(mooncake.importlib.util, "find_spec", lambda name: object())
    assert mooncake.missing() == "Mooncake needs libnothing.so.9: apt-get install libnothing9"
    monkeypatch.setattr(mooncake.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in mooncake.missing()


@pytest.mark.parametrize("protocol", ["rdma", "ascend"])
def test_a_protocol_that_is_not_in_use_is_a_fault(protocol: str) -> None:
    assert mooncake.protocol_fault("tcp") == ""
    assert protocol in mooncake.protocol_fault(protocol)


def test_the_parent_does_not_load_the_library() -> None:
    assert "mooncake.engine" not in sys.modules

"""The limit of Mooncake on this machine: its TransferEngine called directly, a process reading from another's pool."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from sidecar.transport.mooncake import open_engine

Columns = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Offsets in the pool that is read, offsets in the pool that is written, lengths."""
SETTINGS = (("sync", 64), ("sync", 256), ("sync", 1024), ("async", 256), ("async", 1024))
"""How it is called, and spans a call; it fails calls of more than 2,052."""
MAX_SPAN_BYTES = 1 << 20
"""Longer spans are cut, so that its lanes share them."""


def _pool(num_bytes: int, byte: int) -> int:
    """The address of shared memory that is there as long as the process."""
    fd = os.memfd_create("bench-mooncake", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    mapped = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    view = (ctypes.c_char * num_bytes).from_buffer(mapped)
    address = ctypes.addressof(view)
    ctypes.memset(address, byte, num_bytes)
    _kept.extend((mapped, view))
    return address


_kept: list[object] = []


def _serve(pipe: Connection, num_bytes: int) -> None:
    engine, address = open_engine("127.0.0.1", "tcp", ""), _pool(num_bytes, 7)
    assert engine.register_memory(address, num_bytes) == 0
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", address))
    pipe.recv()


def _read(pipe: Connection, num_bytes: int, session: str, remote: int) -> None:
    """Of the spans that come with the number of a setting say how many seconds they took by it."""
    engine, local = open_engine("127.0.0.1", "tcp", ""), _pool(num_bytes, 0)
    while True:
        (starts, to, lengths), setting = pipe.recv()
        given = [remote + start for start in starts], [local + at for at in to], lengths
        started = time.perf_counter()
        _transfer(engine, session, *SETTINGS[setting], *given)
        pipe.send(time.perf_counter() - started)


def _transfer(
    engine: Any, session: str, how: str, num: int, starts: list[int], to: list[int], lengths: Sequence[int]
) -> None:
    for first in range(0, len(lengths), num):
        part = slice(first, first + num)
        call = session, to[part], starts[part], list(lengths[part])
        if how == "sync":
            failed = engine.batch_transfer_sync_read(*call) != 0
        else:
            batch = engine.batch_transfer_async_read(*call)
            failed = batch == 0 or engine.get_batch_transfer_status([batch]) != 0
        if failed:
            raise SystemExit(f"Mooncake failed a call of {len(call[1])} spans")


def cut(columns: Columns) -> Columns:
    starts, to, lengths = [], [], []
    for start, at, length in zip(*columns, strict=True):
        for done in range(0, length, MAX_SPAN_BYTES):
            starts.append(start + done)
            to.append(at + done)
            lengths.append(min(MAX_SPAN_BYTES, length - done))
    return starts, to, lengths


@contextlib.contextmanager
def plain_mooncake(num_bytes: int) -> Iterator[Callable[[Columns, int], float]]:
    """A function that has spans read from one pool of `num_bytes` into another by one of SETTINGS: the seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, num_bytes), daemon=True)
    server.start()
    session, address = _answer(ours)
    to_reader, its = context.Pipe()
    reader = context.Process(target=_read, args=(its, num_bytes, session, address), daemon=True)
    reader.start()

    def read(columns: Columns, setting: int) -> float:
        to_reader.send((cut(columns), setting))
        return float(_answer(to_reader))

    try:
        yield read
    finally:
        for process in (reader, server):
            process.kill()  # an orderly end takes seconds
            process.join()


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(60):
        raise SystemExit("Mooncake did not answer within 60 s")
    return pipe.recv()

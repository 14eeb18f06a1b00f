"""`native/stream_relay.c` as ctypes has it. It was built if there was a C compiler at installation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

MAX_TAIL_BYTES = MAX_ID_BYTES = 256


class Bytes(ctypes.Structure):
    _fields_ = [("at", c_void_p), ("size", c_uint64)]

    def copied(self) -> bytes:
        return ctypes.string_at(self.at, self.size) if self.size else b""


class Block(ctypes.Structure):
    """The head of `struct block`; its bytes follow."""

    _fields_ = [("next", c_void_p), ("size", c_uint64)]


class Shown(ctypes.Structure):
    """`struct shown`: the numbers may be read at any time, the bytes only once the stream was taken."""

    _fields_ = [
        ("num_chunks", c_uint64),
        ("num_reads", c_uint64),
        ("kept", c_void_p),
        ("unsent", Bytes),
        ("rest", Bytes),
        ("forgot", c_uint64),
        ("key", c_uint64),
    ]


class KeptBlocks:
    """What was passed on of a stream, where the thread has put it; freed with this object."""

    __slots__ = ("_at", "_forget")

    def __init__(self, found: ctypes.PyDLL, shown: Shown) -> None:
        self._forget = found.relay_forget
        self._at: int | None = shown.kept
        shown.kept = None

    def __del__(self) -> None:
        self._forget(self._at)

    @property
    def num_bytes(self) -> int:
        return sum(block.size for _, block in self._blocks())

    def copied(self) -> bytes:
        return b"".join(ctypes.string_at(at + ctypes.sizeof(Block), block.size) for at, block in self._blocks())

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        at = self._at
        while at:
            block = Block.from_address(at)
            yield at, block
            at = block.next


def library() -> ctypes.PyDLL | None:
    """None where it was not built or does not load (another system). Its calls keep the GIL: none of them waits, but
    relay_end for the end of one round of the thread, which needs no GIL."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_stream_relay{suffix}")
        if path.exists():
            try:
                return _declared(ctypes.PyDLL(str(path), use_errno=True))
            except (OSError, AttributeError):
                return None
    return None


def _declared(found: ctypes.PyDLL) -> ctypes.PyDLL:
    stream = POINTER(Shown)
    found.relay_start.argtypes, found.relay_start.restype = (c_uint64,), c_void_p
    found.relay_end.argtypes, found.relay_end.restype = (c_void_p,), None
    found.relay_told.argtypes, found.relay_told.restype = (c_void_p,), c_int
    found.relay_lend.argtypes, found.relay_lend.restype = (
        c_void_p, c_int, c_int, c_char_p, c_uint32, c_char_p, c_char_p, c_uint32, c_uint64, c_uint64, c_char_p,
        c_uint64,
    ), stream  # fmt: skip
    found.relay_returned.argtypes, found.relay_returned.restype = (c_void_p,), stream
    found.relay_forget.argtypes, found.relay_forget.restype = (c_void_p,), None
    found.relay_take.argtypes, found.relay_take.restype = (c_void_p, stream), None
    found.relay_done.argtypes, found.relay_done.restype = (c_void_p, stream), None
    return found

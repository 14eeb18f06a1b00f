"""`native/*.c` as ctypes has them. They were built if there was a C compiler at installation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

CopyMoves = Callable[[int, int, int, int, int, int], None]
"""(base and offsets of the destinations, base and offsets of the sources, lengths, how many): addresses of memory and
of 64-bit columns. The interpreter's lock is released."""


def native_library(name: str) -> ctypes.CDLL | None:
    """The sidecar's library of that name; None where it was not built or does not load (another system)."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"{name}{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None
    return None


def copy_moves() -> CopyMoves | None:
    """None where there is no such library."""
    library = native_library("_copy_moves")
    found = getattr(library, "copy_moves", None)
    if found is None:
        return None
    found.argtypes, found.restype = (*(c_void_p,) * 5, c_int64), None
    copy: CopyMoves = found
    return copy

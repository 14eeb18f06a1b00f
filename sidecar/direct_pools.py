"""Producers whose pools our engine reads itself: what it has been given of them, and when it has to let go.

It is given what this sidecar reads small transfers by: the pool, read-only, and the lease board (see lease_board).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from sidecar.layout import KvLayout
from sidecar.message import ProducerKey
from sidecar.protocol import Message, PoolClosed, PoolOpened


class DirectPools:
    """`hand_over` sends a message with descriptors at once, or not at all; `send` any other."""

    def __init__(
        self, hand_over: Callable[[Message, Sequence[int]], bool], send: Callable[[Message], None]
    ) -> None:  # fmt: skip
        self._hand_over = hand_over
        self._send = send
        self._given: set[ProducerKey] = set()

    def give(self, key: ProducerKey, layout: KvLayout, spare: Spare) -> None:
        """A producer has been reached whose blocks are copied whole, and from one rank."""
        fds = spare.fds()
        if fds and self._hand_over(PoolOpened(*key, layout), fds):
            self._given.add(key)

    def take_back(self, key: ProducerKey) -> None:
        """It is gone, or idle; the next contact gives it anew."""
        if key in self._given:
            self._given.discard(key)
            self._send(PoolClosed(*key))


class Spare:
    """Duplicates of the descriptors that came with a producer's pool; none where there are no more to be had."""

    def __init__(self) -> None:
        self._pool = self._board = -1

    def keep_pool(self, fd: int | None) -> None:
        if fd is not None and self._pool < 0:
            with contextlib.suppress(OSError):
                self._pool = os.dup(fd)

    def keep_board(self, fd: int | None) -> None:
        if fd is not None and self._board < 0:
            with contextlib.suppress(OSError):
                self._board = os.dup(fd)

    def fds(self) -> tuple[int, ...]:
        """Both, or none."""
        return () if self._pool < 0 or self._board < 0 else (self._pool, self._board)

    def close(self) -> None:
        """Idempotent."""
        for fd in (self._pool, self._board):
            if fd >= 0:
                os.close(fd)
        self._pool = self._board = -1

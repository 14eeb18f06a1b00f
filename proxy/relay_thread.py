"""Streams that a thread without Python passes on while nothing but token events comes (`native/stream_relay.c`).

A stream is lent between two events and comes back with whatever is not a token event, judged here as if it had just
been read. One that the owner wants back before (its client is gone, its time is up) is taken. Where the library was not
built, or for TLS, Python passes every token on by itself: the same bytes, at two to three times the CPU.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

from proxy.lending import Returned, Terms
from proxy.relay_library import MAX_ID_BYTES, MAX_TAIL_BYTES, KeptBlocks, library

log = logging.getLogger(__name__)

NAP_US = 500
"""Between two rounds of the thread when many streams are ready at once: their next tokens go on together."""


class Loan:
    """One stream that is lent, until `end`."""

    __slots__ = ("_key", "_settle", "_shown", "_stream", "_thread", "_times_seen", "_transport")

    def __init__(
        self,
        thread: RelayThread,
        key: int,
        stream: Any,
        transport: asyncio.ReadTransport,
        settle: Callable[[Returned], None],
    ) -> None:
        self._thread = thread
        self._key = key
        self._stream = stream
        self._shown = stream.contents
        self._times_seen = 0
        self._transport = transport
        self._settle = settle

    def has_moved(self) -> bool:
        """Whether anything came since this was asked last."""
        seen, self._times_seen = self._times_seen, self._shown.num_reads
        return bool(seen != self._times_seen)

    def end(self) -> Returned:
        """The stream is the lender's again, at once, and `settle` was told. Only once."""
        returned = self._thread.take(self._key, self._stream)
        if not self._transport.is_closing():
            self._transport.resume_reading()
        self._settle(returned)
        return returned


class RelayThread:
    """`start`, then `lend` as often as it is wanted, and `stop` once every stream was taken."""

    def __init__(self, loop: asyncio.AbstractEventLoop, found: ctypes.PyDLL, relay: int, max_lent: int) -> None:
        self._loop = loop
        self._max_lent = max_lent
        self._library = found
        self._relay = relay
        self._keys = itertools.count(1)
        self._on_return: dict[int, Callable[[], None]] = {}
        self._told = found.relay_told(relay)
        loop.add_reader(self._told, self._take_returned)

    @classmethod
    def start(cls, loop: asyncio.AbstractEventLoop, max_lent: int = 1 << 20) -> RelayThread | None:
        """None if there is no library here, or no thread to be had. It never has more than `max_lent` streams."""
        found = library()
        if found is None:
            log.info("event=no_stream_relay: every token is passed on in Python (no C compiler at installation)")
            return None
        relay = found.relay_start(NAP_US)
        if not relay:
            log.warning("event=no_stream_relay error=%s", os.strerror(ctypes.get_errno()))
            return None
        return cls(loop, found, relay, max_lent)

    @property
    def num_lent(self) -> int:
        return len(self._on_return)

    def lend(
        self,
        source: asyncio.ReadTransport,
        client: int,
        terms: Terms,
        first: bytes,
        on_return: Callable[[], None],
        settle: Callable[[Returned], None],
    ) -> Loan | None:
        """Write `first`, and then what comes from `source`, which is not read meanwhile, to the descriptor `client`,
        which nobody else writes to meanwhile. `on_return` is called when the loan is to be ended because something else
        came; the lender may end it before. None if the thread can't have it: nothing was sent then."""
        if len(self._on_return) >= self._max_lent:
            return None
        tail, old, new, room = terms
        descriptor = source.get_extra_info("socket").fileno()
        if len(tail) > MAX_TAIL_BYTES or len(old) > MAX_ID_BYTES or len(old) != len(new) or source.is_closing():
            return None
        source.pause_reading()
        key = next(self._keys)
        stream = self._library.relay_lend(
            self._relay, descriptor, client, tail, len(tail), old, new, len(old), max(room, 0), key, first, len(first)
        )
        if not stream:
            source.resume_reading()
            return None
        self._on_return[key] = on_return
        return Loan(self, key, stream, source, settle)

    def take(self, key: int, stream: Any) -> Returned:
        del self._on_return[key]
        self._library.relay_take(self._relay, stream)
        shown = stream.contents
        kept = None if shown.forgot else KeptBlocks(self._library, shown)
        returned = Returned(shown.num_chunks, kept, shown.unsent.copied(), shown.rest.copied())
        self._library.relay_done(self._relay, stream)
        return returned

    def _take_returned(self) -> None:
        while stream := self._library.relay_returned(self._relay):
            self._on_return[stream.contents.key]()

    def stop(self) -> None:
        self._loop.remove_reader(self._told)
        self._library.relay_end(self._relay)

"""A stream on its way to its client, read after read, without I/O: what is passed on as it is, and what is looked into.

A read that ends as token events end is passed on untouched and kept by reference; nothing of it is parsed, that is for
a continuation, should there be one (`proxy/continuation.py`). Every other read is cut into events: a usage gets the
prefiller's `cached_tokens`, what a decoder says that gave up is swallowed, and half an event is held back until the
other half comes. So the client always stands between two events, where a stream can be gone on with or ended.
"""

from __future__ import annotations

from collections.abc import Callable

import orjson

from proxy import http1
from proxy.answer_id import renaming
from proxy.chunked_body import ChunkDecoder
from proxy.continuation import RECOMPUTED, Continuation, Delivered, delivered_in, is_recomputed, parsed_object
from proxy.errors import BadHead
from proxy.lending import Kept, Terms
from proxy.prompt_facts import with_cached_tokens
from proxy.sse import EVENT_END, data_of, error_of

USAGE = b'"usage":{'
ERROR = b'data: {"error"'
NAMED_ERRORS = (b"event: error", b"event: response.failed")
_FINISH = b'"finish_reason":null'
_EVENT_AND_CHUNK_END = b"\n\n\r\n"
_STREAM_END = _EVENT_AND_CHUNK_END + http1.LAST_CHUNK
_MAX_TAIL_BYTES = 256
_MAX_USAGE_BYTES = 4096
_MAX_LAST_READS = 4  # the last token, the usage, and [DONE]


def token_tail(read: bytes) -> bytes:
    """How a token event of this stream ends, its chunk's end included; empty where that is not to be told.

    It says that nothing is finished, so a read that ends like it holds neither a usage nor a given-up answer: both come
    after a choice's last token. It must not be used for streams of several choices."""
    start = read.rfind(_FINISH)
    tail = read[start:] if start >= 0 else b""
    fit = tail.endswith(_EVENT_AND_CHUNK_END) and tail.count(b"\n\n") == 1 and len(tail) <= _MAX_TAIL_BYTES
    return tail if fit and USAGE not in read and RECOMPUTED not in read else b""


class ClientStream:
    """`sink_for` gives what a decoder's body is fed to, one decoder after the other; `write` gets what the client is
    sent, in chunks unless `chunked` is false (an HTTP/1.0 client). `is_named`: events have names (/v1/messages)."""

    def __init__(
        self,
        write: Callable[[bytes], None],
        *,
        chunked: bool,
        one_choice: bool,
        is_named: bool = False,
        max_kept_bytes: int,
        max_event_bytes: int,
    ) -> None:
        self._write = write
        self._frame = http1.chunk if chunked else bytes
        self._chunked = chunked
        self._one_choice = one_choice
        self._is_named = is_named
        self._error_marks = NAMED_ERRORS if is_named else ERROR
        self._max_event_bytes = max_event_bytes
        self._kept: list[bytes | Kept] = []
        self._room = max_kept_bytes
        self._decoder: ChunkDecoder | None = None
        self._chunked_in = True
        self._pending = b""
        self._torn = False
        self._opening = b""
        self._renaming: tuple[bytes, bytes] | None = None
        self._reframes = False
        self._ended_well = False
        self._usage_read = b""  # where nothing is kept
        self.ids = ("", "")
        """The decode leg's and the request's, of which the first is to be replaced by the second."""
        self.is_finished = False
        """All of the answer is there, though its decoder did not end it."""
        self.cached_tokens: int | None = None
        """What a usage is to say instead of the decoder's own number."""
        self.continuation: Continuation | None = None
        """The stream goes on with the rest of an answer."""
        self.broken_by = ""
        """What the decoder said instead of going on ("recomputed", "error_event"). All from there is swallowed."""
        self.error = b""
        self.lend: Callable[[bytes, bytes], bool] | None = None
        """Called with the end of a token event, and with bytes for the client that end so. True: they were sent, and
        what follows will be without the sink, until something else comes."""
        self.garbled = False
        """The decoder's framing cannot be read on. All from there is swallowed."""

    # --- bytes in

    def begin(self, opening: bytes, first: bytes, chunked_in: bool) -> Callable[[bytes], None]:
        """Pass on `opening` (a head) and the first of a decoder's body. Returns the sink for the rest of it."""
        self._decoder, self._pending, self._chunked_in = None, b"", chunked_in
        self.broken_by, self.error, self.garbled = "", b"", False
        self._opening = opening
        self._rename(first)
        tail = b""
        if self._one_choice and self._chunked and chunked_in and self.continuation is None and not self._reframes:
            tail = token_tail(first)
        if tail and self._is_plain(first):
            first, self._opening = self._named(first), b""  # kept by the name that the client knows
            self._pass(tail, first, opening + first)
        else:
            self.feed(first)
            if self._opening:
                self._send(b"")
        return self._passing(tail) if tail else self._feeding

    def _rename(self, first: bytes) -> None:
        """An id is replaced by one as long, with the blanks that JSON allows behind it: no chunk changes its size."""
        self._renaming, self._reframes = None, False
        if self.ids[0] != self.ids[1] and (found := renaming(first, *self.ids)) is not None:
            old, new = found
            self._renaming = old, new.ljust(len(old))
            self._reframes = len(new) > len(old)

    def _passing(self, tail: bytes) -> Callable[[bytes], None]:
        """The hot path where the stream is not lent."""
        feed, pass_, named = self.feed, self._pass, self._named
        midway = self._decoder is not None or bool(self.broken_by)

        def sink(data: bytes) -> None:
            nonlocal midway
            if midway or not data.endswith(tail):
                midway = feed(data)
            else:
                pass_(tail, data, named(data))

        return sink

    def _pass(self, tail: bytes, data: bytes, sent: bytes) -> None:
        """Keep `data` and have it `sent`, by whoever has the stream from now on."""
        if self._room >= 0:
            self._keep(data)
        if self.lend is None or not self.lend(tail, sent):
            self._write(sent)

    def terms(self, tail: bytes) -> Terms:
        """Under which the stream can be lent between two events."""
        return Terms(tail, *(self._renaming or (b"", b"")), self._room)

    def _named(self, data: bytes) -> bytes:
        """As the client is sent it."""
        return data.replace(*self._renaming) if self._renaming is not None else data

    def lent_passed(self, kept: Kept | None) -> None:
        """What went to the client while the stream was lent; None if it was too much to be kept."""
        if kept is None:
            self._forget()
        else:
            self._kept.append(kept)
            self._room -= kept.num_bytes  # which the terms have limited

    def _feeding(self, data: bytes) -> None:
        self.feed(data)

    def feed(self, data: bytes) -> bool:
        """Events as they become whole. Returns whether the next read goes on within a chunk or an event."""
        if self.garbled or self._ended_well:
            return True
        if self._room < 0:
            if USAGE in data:
                self._usage_read = data
            elif self._usage_read:  # it may go on here
                self._usage_read = self._usage_read[-_MAX_USAGE_BYTES:] + data
        if self._decoder is None and self._is_plain(data):
            data = self._named(data)
            self._keep(data)
            self._send(data)
            self._ended_well = data.endswith(_STREAM_END)
            return False
        complete = False
        if self._chunked_in:
            decoder = self._decoder = self._decoder or ChunkDecoder()
            try:
                pieces, _ = decoder.feed(data)
            except BadHead:  # the parser of the connection took it; two readers that differ must not go on
                self.garbled = True
                return True
            complete = decoder.complete
            data = b"".join(pieces)
        out = self._take_events(data, complete)
        if out:
            framed = self._frame(out)
            self._keep(framed)
            self._send(framed + http1.LAST_CHUNK if complete and self._may_end else framed)
        elif complete and self._may_end:
            self._send(http1.LAST_CHUNK)
        if complete and self._may_end:
            self._ended_well = True
        if self._decoder is not None and self._decoder.between_chunks and not self._pending and self._chunked:
            self._decoder = None
        return self._decoder is not None or bool(self.broken_by)

    @property
    def _may_end(self) -> bool:
        return self._chunked and not self.broken_by and not self.garbled

    def _is_plain(self, data: bytes) -> bool:
        """Whether there is nothing to be done with a read that comes between two chunks."""
        return (
            self._chunked and self._chunked_in and self.continuation is None and not self.broken_by
            and not self._reframes
            and data.endswith((_EVENT_AND_CHUNK_END, _STREAM_END)) and RECOMPUTED not in data and ERROR not in data
            and not (self._is_named and any(mark in data for mark in NAMED_ERRORS))
            and (self.cached_tokens is None or USAGE not in data)
        )  # fmt: skip

    def feed_whole(self, opening: bytes, payload: bytes) -> None:
        """A stream that came whole before it was passed on, without its framing."""
        self._decoder, self._pending, self._chunked_in = None, b"", False
        self.broken_by, self.error, self.garbled = "", b"", False
        self._opening = opening
        self._rename(payload)
        self.feed(payload)
        if self._opening:
            self._send(b"")

    def end(self) -> None:
        """The decoder's message ended as it should: so does the client's, unless that is written already."""
        if self._pending:
            self._send(self._frame(self._named(self._pending)))
            self._pending = b""
        if self._chunked and not self._ended_well:
            self._send(http1.LAST_CHUNK)

    # --- events

    def _take_events(self, data: bytes, complete: bool) -> bytes:
        if self.broken_by:
            return b""
        pending = self._pending + data if self._pending else data
        out: list[bytes] = []
        start = 0
        for end in EVENT_END.finditer(pending):
            event, start = pending[start : end.end()], end.end()
            event = self._edited(event)
            if self.broken_by:
                self._pending = b""
                return self._named(b"".join(out))
            out.append(event)
        rest = pending[start:]
        if complete or len(rest) > self._max_event_bytes:
            self._torn = self._torn or bool(rest and not complete)
            out.append(rest)
            rest = b""
        self._pending = rest
        return self._named(b"".join(out))

    def _edited(self, event: bytes) -> bytes:
        if event.startswith(self._error_marks) and (error := error_of(event)) is not None and error[0] >= 500:
            self.broken_by, self.error = "error_event", event if parsed_object(data_of(event)) is not None else b""
            return b""
        rest = self.continuation
        usage = USAGE in event and (self.cached_tokens is not None or rest is not None)
        if usage and self.cached_tokens is not None and event.startswith(b"event:"):
            return with_cached_tokens(event, self.cached_tokens)
        if not event.startswith(b"data:") or not (usage or rest is not None or RECOMPUTED in event):
            return event
        parsed = parsed_object(event[5:])
        if parsed is None:
            return event
        if is_recomputed(parsed):
            self.broken_by = "recomputed"
            return b""
        if not usage and rest is None:
            return event
        self._set_cached(parsed)
        if rest is not None and "error" not in parsed:
            told = rest.edited(parsed)
            if told is None:
                return b""
            parsed = told
        return b"data: " + orjson.dumps(parsed) + b"\n\n"

    def _set_cached(self, parsed: dict[str, object]) -> None:
        usage = parsed.get("usage")
        if self.cached_tokens is None or not isinstance(usage, dict) or "prompt_tokens_details" not in usage:
            return
        details = usage["prompt_tokens_details"]
        if isinstance(details, dict):
            details["cached_tokens"] = self.cached_tokens
        elif self.cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}

    # --- what was passed on

    def _send(self, data: bytes) -> None:
        opening, self._opening = self._opening, b""
        if opening or data:
            self._write(opening + data if opening else data)

    def _keep(self, framed: bytes) -> None:
        self._room -= len(framed)
        if self._room < 0:
            self._forget()
        else:
            self._kept.append(framed)

    def _forget(self) -> None:
        self._kept.clear()
        self._room = -1

    @property
    def is_whole_events(self) -> bool:
        """Whether the client stands between two events, so that one more can be added."""
        return not self._torn

    @property
    def last_reads(self) -> bytes:
        """Of what was passed on, where a usage is if there is one: not in what was lent."""
        last = [read for read in self._kept[-_MAX_LAST_READS:] if isinstance(read, bytes)]
        return b"".join(last) or self._usage_read

    def delivered(self) -> Delivered | None:
        """What the client has, parsed now; None if it was too much to be kept. Raises NotExact."""
        if self._room < 0 or self._torn:
            return None
        kept = b"".join(read if isinstance(read, bytes) else read.copied() for read in self._kept)
        return delivered_in(http1.dechunk(kept) if self._chunked else kept)

"""One HTTP/1.1 connection to an instance.

It carries one request at a time. Until its answer has come (whole, or up to the first telling event of a
stream) everything is gathered and a future says how it went; from then on bytes go from `data_received` to a sink (the
client's `write`) as they come, framing included, and the parser only tracks where the message ends.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, cast

import httptools

from proxy import http1, sse
from proxy.answer import Answer
from proxy.errors import BadHead, Failure, UpstreamFailure
from proxy.http1 import HEAD_END, ResponseHead
from proxy.late_acks import acknowledge_late
from proxy.lending import Returned, Terms
from proxy.long_body import Body, LongBody
from proxy.relay_thread import Loan, RelayThread

if TYPE_CHECKING:
    from proxy.upstream_pool import UpstreamPool

GATHER_WHOLE, GATHER_FIRST_EVENT = False, True
_NOT_HTTP = (httptools.HttpParserError, httptools.HttpParserUpgrade)  # nobody was asked for another protocol
GRACE_S = 1.0  # for whoever waited in vain to close the connection


class UpstreamConnection(asyncio.Protocol):
    """States: idle (no `waiter`, no `sink`), gathering (`waiter` set), relaying (`sink` set; lent or not), closed."""

    __slots__ = (
        "_chunks", "_complete", "_feed", "_first_chunk", "_first_event_only", "_head", "_head_end", "_heard", "_loan",
        "_num_interim", "_on_end", "_overrun", "_parser", "_paused", "_raw", "_reused", "_sink", "_socket",
        "deadline", "idle_since", "lingers", "num_lent_chunks", "on_chunk_complete", "pool", "sent_at", "transport",
        "waiter",
    )  # fmt: skip

    def __init__(self, pool: UpstreamPool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport | None = None
        self.waiter: asyncio.Future[Answer] | None = None
        self._chunks: Iterator[int] = itertools.count()
        self._first_chunk = 0
        self.on_chunk_complete = self._chunks.__next__  # llhttp calls it once a chunk: engines send an event a chunk
        self._parser = http1.response_parser(self)
        self._feed = self._parser.feed_data
        self._head = ResponseHead()
        self._head_end = 0
        self._num_interim = 0
        self._raw: bytes | bytearray = b""
        self._complete = False
        self._overrun = False
        self._reused = False
        self._first_event_only = False
        self._sink: Callable[[bytes], None] | None = None
        self._on_end: Callable[[Failure | None], None] | None = None
        self._heard = False
        self._paused = False
        self._socket: socket.socket | None = None
        self._loan: Loan | None = None
        self.num_lent_chunks = 0
        self.lingers = False
        self.deadline = 0.0
        self.sent_at = 0.0
        self.idle_since = 0.0

    # --- llhttp's callbacks

    def on_message_begin(self) -> None:
        if self._complete or (self.waiter is None and self._sink is None):
            self._overrun = True  # more than one answer to one request
        self._head = ResponseHead()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head.add(name, value)

    def on_headers_complete(self) -> None:
        self._head.status = self._parser.get_status_code()
        if self._head.chunked and self._parser.get_http_version() != "1.1":
            raise BadHead("Transfer-Encoding in an answer that is not HTTP/1.1")

    def on_message_complete(self) -> None:
        if self._head.status < 200:
            self._num_interim += 1
            self._head.status = 0
        else:
            self._head.keep_alive = self._parser.should_keep_alive()
            self._complete = True

    # --- one request

    def send(
        self, head: bytes, body: Body, *, first_event_only: bool, now: float, timeout_s: float
    ) -> asyncio.Future[Answer]:
        """Send a request on this idle connection. The future fails with UpstreamFailure or is cancelled by its waiter.

        After a cancellation, TIMEOUT or INSTANCE_OUT it is still open: the waiter calls `close` or `hang_up`."""
        assert self.transport is not None
        self._first_event_only = first_event_only
        self._raw = b""
        self._head_end = 0
        self._complete = False
        self._heard = False
        self.sent_at = now
        self.deadline = now + timeout_s
        self.waiter = waiter = self.pool.loop.create_future()
        if self.transport.is_closing():
            self._failed(Failure.STALE if self._reused else Failure.RESET, "the connection was closed at once")
            return waiter
        if type(body) is not bytes:
            self.transport.writelines((head, *cast(LongBody, body).pieces))
        elif len(body) < 16384:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        return waiter

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:
            self._gather(data)
            return
        try:
            self._feed(data)
        except _NOT_HTTP:
            self._ended(Failure.GARBAGE_MID_ANSWER)
            return
        if self._overrun:
            self._ended(Failure.GARBAGE_MID_ANSWER)
            return
        self._heard = True
        try:
            sink(data)
        except RuntimeError:  # uvloop: the client's transport is closed, and its protocol will be told in a moment
            self.stop_relay()
            return
        if self._complete:
            self._ended(None)

    def _gather(self, data: bytes) -> None:
        self._heard = True
        raw = self._raw
        if not raw:  # a small answer comes in one read and needs no copy
            self._raw = data
        elif type(raw) is bytearray:
            raw += data
        else:
            self._raw = bytearray(raw) + data
        try:
            self._feed(data)
        except _NOT_HTTP as error:
            self._failed(Failure.GARBAGE, f"not HTTP: {error.__context__ or error}")
            return
        if self._overrun:
            self._failed(Failure.GARBAGE, "more than one answer to one request")
            return
        while self._num_interim:  # 1xx heads are skipped (RFC 9110 section 15.2)
            self._num_interim -= 1
            self._raw = self._raw[self._raw.find(HEAD_END) + 4 :]
        head = self._head
        if not self._head_end:
            if not head.status:
                return
            self._head_end = self._raw.find(HEAD_END) + 4
            head.close_delimited = not head.chunked and head.content_length is None and head.status not in (204, 304)
        if self._complete:
            self._answered(None)
        elif self._first_event_only and head.event_stream and head.status == 200:
            body = bytes(self._raw[self._head_end :])
            event = sse.first_telling_event(http1.dechunk(body) if head.chunked else body)
            if event is not None or len(body) > self.pool.config.max_first_event_bytes:
                self._answered(event)
        elif len(self._raw) > self.pool.config.max_answer_bytes:
            self._failed(Failure.GARBAGE, "the answer is larger than --max-answer-bytes")

    def _answered(self, event: bytes | None) -> None:
        waiter = self.waiter
        if waiter is None or waiter.done():
            return  # the gate has opened already, and more came before anybody took it: it is in `_raw`
        head = self._head
        raw = bytes(self._raw[self._head_end :])
        if event is None and self._first_event_only and head.event_stream and head.status == 200:
            event = sse.first_telling_event(http1.dechunk(raw) if head.chunked else raw)
        answer = Answer(self, head, raw, self._complete, event)
        waiter.set_result(answer)
        if self._complete:
            self._end_exchange()

    def _failed(self, failure: Failure, message: str) -> None:
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(UpstreamFailure(failure, f"{self.pool.address}: {message}"))
        if failure not in (Failure.TIMEOUT, Failure.INSTANCE_OUT):
            self.close()

    # --- relaying

    def relay(
        self,
        begin: Callable[[bytes], Callable[[bytes], None]],
        on_end: Callable[[Failure | None], None],
        timeout_s: float,
    ) -> None:
        """Pass on the body as it is framed: what there is of it to `begin`, what comes to the sink that this returns;
        then say how it ended, once.

        Neither must wait; they may raise RuntimeError, which ends the relay without a word: the client is gone."""
        first = bytes(self._raw[self._head_end :])
        self._raw = b""
        self.waiter = None
        self._first_chunk = next(self._chunks)
        self.num_lent_chunks = 0
        self._heard = True
        self._on_end = on_end
        self.deadline = monotonic() + timeout_s
        if self.transport is not None and not self.transport.is_closing():
            acknowledge_late(self._socket)
        try:
            self._sink = begin(first)
        except RuntimeError:
            self._on_end = None
            self.close()
            return
        if self._complete:
            self._ended(None)
        elif self.transport is None or self.transport.is_closing():  # it died since the first event
            self._ended(self._failure_at_loss())

    def stop_relay(self) -> None:
        """The client is gone: what still comes is for nobody. `on_end` is not called. Does nothing if there is none."""
        if self._sink is not None:
            self._sink = self._on_end = None
            self.close()

    def lend(
        self, thread: RelayThread, client: int, terms: Terms, first: bytes, settle: Callable[[Returned], None]
    ) -> bool:
        """Let `thread` write `first`, and what follows it from the end of a chunk on, to the descriptor `client`.
        `settle` is told what became of that before anything else comes. False if nothing was done."""
        if self.transport is not None and self.pool.tls is None and not self._paused:
            self._loan = thread.lend(self.transport, client, terms, first, self._came_back, settle)
        return self._loan is not None

    def _came_back(self) -> None:
        """With something that is not a token event, or because the client takes no more."""
        rest = self._take_back()
        if rest and self._sink is not None:
            self.data_received(rest)

    def _take_back(self) -> bytes:
        """What was lent and not passed on, as if it had just been read."""
        loan, self._loan = self._loan, None
        if loan is None:
            return b""
        returned = loan.end()
        self._heard = True
        self.num_lent_chunks += returned.num_chunks
        return returned.rest

    def _ended(self, failure: Failure | None) -> None:
        on_end, self._on_end = self._on_end, None
        self._sink = None
        if failure is None:
            self._end_exchange()
        else:
            self.close()
        if on_end is not None:
            on_end(failure)

    def pause(self) -> None:
        if self.transport is not None and self._loan is None and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.transport is not None and not self.transport.is_closing():
            self._paused = False
            self._heard = True
            self.transport.resume_reading()

    # --- the end of an exchange, and of the connection

    def _end_exchange(self) -> None:
        if self._head.keep_alive and not self._overrun and not self._head.close_delimited and not self.lingers:
            if self._paused:
                self.resume()
            self.waiter = None
            self._reused = True
            self.pool.put_back(self)
        else:
            self.close()

    def hang_up(self, on_answer: Callable[[Answer], None], deadline: float) -> None:
        """Nobody wants the answer, but it may hand out KV: close our half and read on until the instance ends it.

        `on_answer` is called only if a whole answer arrives before `deadline`."""
        self.lingers = True
        if self._complete:  # it came after the waiter was cancelled and before the waiter knew
            self.close()
            on_answer(Answer(self, self._head, bytes(self._raw[self._head_end :]), True, None))
            return
        if self.transport is None or self.transport.is_closing():
            return
        waiter = self.waiter = self.pool.loop.create_future()
        waiter.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() is not None else on_answer(done.result())
        )
        self.deadline = deadline
        self._first_event_only = GATHER_WHOLE
        if self.transport.can_write_eof():  # TLS has no such half: the answer is waited for, and nobody told
            self.transport.write_eof()

    def close(self) -> None:
        self._take_back()
        self.pool.active.discard(self)
        if self.transport is None:
            return
        abort = self.transport.abort
        # not at once with TLS: uvloop, which may be in the middle of a record, would go on and log a bug
        abort() if self.pool.tls is None else self.pool.loop.call_soon(abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have this interface and are not of this class
        self.transport = transport = cast(asyncio.Transport, transport)
        self._socket = transport.get_extra_info("socket")
        acknowledge_late(self._socket)

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.forget(self)
        if self._sink is not None:
            self._ended(self._failure_at_loss() if exc is None else Failure.LOST_MID_ANSWER)
        elif self.waiter is not None and not self.waiter.done():
            if exc is None and self._head_end and self._head.close_delimited:
                self._complete = True
                self._answered(None)
            elif self._reused and not self._raw:
                self._failed(Failure.STALE, "the reused connection was closed")
            else:
                self._failed(Failure.RESET, "the connection was closed before the answer was there")

    def _failure_at_loss(self) -> Failure | None:
        return None if self._head.close_delimited else Failure.LOST_MID_ANSWER

    def check_deadline(self, now: float, between_tokens_s: float) -> None:
        """For a connection in use; one coarse scan instead of a timer a request."""
        if self.heard:
            self._heard = False
            self.pool.heard_at = now
            if self._sink is not None:
                self.deadline = now + between_tokens_s
                acknowledge_late(self._socket)
        if self._sink is not None and self._paused:
            self.deadline = now + between_tokens_s
        elif now > self.deadline:
            if self._sink is not None:
                self._ended(Failure.SILENT_MID_ANSWER)
            elif self.lingers or self.waiter is None or self.waiter.done():
                self.close()
            else:
                self.deadline = now + GRACE_S
                self._failed(Failure.TIMEOUT, "no answer in time")

    def instance_is_out(self) -> None:
        """The instance is out and nothing came of late: whoever waits is told now, not at the deadline."""
        if self._paused:  # the silence is ours
            return
        if self._sink is not None:
            self._ended(Failure.SILENT_MID_ANSWER)
        elif not self.lingers and self.waiter is not None and not self.waiter.done():
            self.deadline = monotonic() + GRACE_S
            self._failed(Failure.INSTANCE_OUT, "silent, and out by its probes")

    def end_relay(self, failure: Failure) -> None:
        """The answer is to end here, whatever is still to come. Does nothing if there is no relay."""
        if self._sink is not None:
            self._ended(failure)

    @property
    def heard(self) -> bool:
        """Whether bytes came since the last `check_deadline`."""
        if self._loan is not None and self._loan.has_moved():
            self._heard = True
        return self._heard

    @property
    def num_chunks(self) -> int:
        """How many chunks have come since `relay` (asking counts as one, so ask once)."""
        return next(self._chunks) - self._first_chunk - 1 + self.num_lent_chunks

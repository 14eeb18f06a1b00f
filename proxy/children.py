"""A request that is divided: its children are requests of their own, answered to a stand-in for the client, and what
they answer is joined.

Each child goes through the whole frame of a request (`dispatch.py`): it is admitted, prefilled, decoded, retried and
continued by itself, with its own loads and ledger entries. The first that fails fails the request; the others are
cancelled, as they are when the client leaves.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from time import monotonic

from proxy import http1, sse
from proxy.downstream import Relayed
from proxy.errors import Failure, ProxyError
from proxy.flow import Flow
from proxy.http1 import RequestHead, ResponseHead
from proxy.joining import EventSplitter, StreamJoiner, child_bodies, joined_answer
from proxy.relaying import BROKEN
from proxy.retry import TABLE, Leg

Serve = Callable[[Flow, bytes], asyncio.Task[None]]
LOST = "A decode instance was lost in the middle of the answer."
MakeFlow = Callable[["Child", RequestHead, str], Flow]


class Child(asyncio.WriteTransport):
    """One child's client, and its transport: reads the answer off the bytes that a client would get."""

    def __init__(self, family: Family, index: int) -> None:
        super().__init__()
        self._family = family
        self._parser = http1.response_parser(self)
        self._pieces: list[bytes] = []
        self._splitter = EventSplitter()
        self._upstream: Relayed | None = None
        self.index = index
        self.head = ResponseHead()
        self.flow: Flow
        self.gone = False

    # --- llhttp's callbacks

    def on_message_begin(self) -> None: ...

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head.add(name, value)

    def on_headers_complete(self) -> None:
        self.head.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None: ...

    # --- what an answer is written to

    @property
    def transport(self) -> asyncio.WriteTransport:
        return self

    def is_closing(self) -> bool:
        return self.gone

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.gone:
            return
        self._parser.feed_data(data)
        if self.streams and self._pieces:
            events = self._splitter.feed(b"".join(self._pieces))
            self._pieces.clear()
            self._family.heard(self, events)

    def lendable(self) -> int | None:
        return None

    def relay_from(self, upstream: Relayed | None) -> None:
        self._upstream = upstream
        if self._family.paused:
            self.pause()

    def end_relay(self, failure: Failure) -> bool:
        if self._upstream is None:
            return False
        self._upstream.end_relay(failure)
        return True

    def answered(self, *, close: bool) -> None:
        if not self.gone:
            self.gone = True
            self._family.child_ended(self)

    def break_off(self) -> None:
        if not self.gone:
            self.gone = True
            self._family.fail(self)

    # --- what its family asks of it

    @property
    def streams(self) -> bool:
        return self.head.event_stream and self.head.status == 200

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    def leave(self) -> None:
        """Nobody reads any more: what is still relayed is ended, as when a client goes."""
        self.gone = True
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.stop_relay()

    def pause(self) -> None:
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        if self._upstream is not None:
            self._upstream.resume()


class Family:
    """The children of one request. `answer()` once; it returns when the client has its answer."""

    def __init__(self, parent: Flow, make_flow: MakeFlow, serve: Serve) -> None:
        self._parent = parent
        self._serve = serve
        self._ended = asyncio.get_running_loop().create_future()
        self.paused = False
        self._is_silent = True
        self._children: list[Child] = []
        head = copy.copy(parent.head)  # what the client's HTTP version can't do is not the children's matter
        head.version, head.keep_alive = "1.1", True
        self._bodies = child_bodies(parent.call)
        for index in range(len(self._bodies)):
            child = Child(self, index)
            child.flow = make_flow(child, head, f"{parent.engine_id}-c{index}")
            child.flow.is_child = True
            self._children.append(child)
        self._num_left = len(self._children)
        parent.children = [child.flow for child in self._children]
        self._num_choices = parent.call.num_choices
        names = [child.flow.request_id for child in self._children]
        self._joiner = StreamJoiner(names, self._num_choices, parent.request_id)

    async def answer(self) -> None:
        """Raises ProxyError where the client has seen nothing yet."""
        tasks = [self._serve(child.flow, body) for child, body in zip(self._children, self._bodies, strict=True)]
        self._bodies = []
        try:
            await self._ended
        finally:
            for child in self._children:
                child.leave()
            self._parent.client.relay_from(None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- said by children; nothing here waits

    def heard(self, child: Child, events: list[bytes]) -> None:
        """Events of a stream, complete ones."""
        if self._ended.done():
            return
        told: list[bytes] = []
        for event in events:
            if sse.error_of(event) is not None:
                self._tell(child, b"".join(told) + event + b"\n\n" + sse.DONE)
                self._end("upstream_error")
                return
            told.append(self._joiner.event(child.index, event))
        self._tell(child, b"".join(told))

    def child_ended(self, child: Child) -> None:
        if self._ended.done():
            return
        self._num_left -= 1
        if child.head.status >= 300:
            self._pass_on(child)
        elif self._num_left == 0:
            if not self._parent.headers_sent:
                self._send_whole()
            elif all(child.streams for child in self._children):
                self._tell(child, self._joiner.end())
                self._end("ok")
            else:
                self.fail(child)

    def fail(self, child: Child) -> None:
        """A child's answer broke off where not even an error could be said."""
        if self._ended.done():
            return
        if not self._parent.headers_sent:
            self._ended.set_exception(ProxyError(502, LOST, error_type="upstream_error"))
            return
        self._tell(child, sse.error_event(502, LOST, "upstream_error"))
        self._end(child.flow.outcome)

    # --- the client's answer

    def _pass_on(self, child: Child) -> None:
        """A child's error is the request's."""
        parent = self._parent
        if parent.headers_sent:
            self._tell(child, b"data: " + child.body + b"\n\n" + sse.DONE)
            self._end(child.flow.outcome)
            return
        parent.status = child.head.status
        self._write_whole(child, child.body)
        self._finish(child.flow.outcome)

    def _send_whole(self) -> None:
        first = self._children[0]
        try:
            if any(child.streams for child in self._children):
                raise ValueError("some answers are streams")
            bodies = [child.body for child in self._children]
            body = joined_answer(bodies, self._num_choices, first.flow.request_id, self._parent.request_id)
        except ValueError as error:
            told = f"The answers of the decode instances cannot be joined: {error}."
            self._ended.set_exception(ProxyError(502, told, error_type="upstream_error"))
            return
        self._parent.status = 200
        self._write_whole(first, body)
        self._finish("ok")

    def _write_whole(self, child: Child, body: bytes) -> None:
        parent = self._parent
        head = child.head.rebuilt(parent.id_lines, http1.content_length_line(len(body)), parent.close)
        parent.client.write(head + body)

    def _tell(self, child: Child, payload: bytes) -> None:
        """Send a part of the stream; the first brings the client's 200."""
        parent = self._parent
        if not payload:
            return
        chunked = parent.head.version == "1.1"
        data = http1.chunk(payload) if chunked else payload
        if self._is_silent:
            self._is_silent = False
            parent.stop_keep_alive()
            parent.client.relay_from(self)
        if not parent.headers_sent:
            parent.headers_sent = True
            parent.first_event_at = monotonic()
            parent.status = 200
            parent.close = parent.close or not chunked
            framing = http1.CHUNKED_LINE if chunked else b""
            data = child.head.rebuilt(parent.id_lines, framing, parent.close) + data
        parent.client.write(data)

    def _end(self, outcome: str) -> None:
        """The stream's last words are said."""
        if self._parent.head.version == "1.1":
            self._parent.client.write(http1.LAST_CHUNK)
        self._finish(outcome)

    def _finish(self, outcome: str) -> None:
        self._parent.outcome = outcome
        self._ended.set_result(None)

    # --- what the client's connection asks of the source of a stream

    def pause(self) -> None:
        self.paused = True
        for child in self._children:
            child.pause()

    def resume(self) -> None:
        self.paused = False
        for child in self._children:
            child.resume()

    def end_relay(self, failure: Failure) -> None:
        if not self._ended.done():
            status = TABLE[Leg.DECODE, failure].status
            event = sse.error_event(status, BROKEN.get(failure, LOST), "upstream_error")
            self._tell(self._children[0], event)
            self._end(failure.value)

    def stop_relay(self) -> None:
        """The client is gone; its task is cancelled next, and with it the children."""

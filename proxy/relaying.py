"""Answers that go on after their decoder is lost or gave up the KV: the story is told again, for the rest.

A stream is relayed as it comes until its framing says that it has ended. What follows a loss is one more story with
the continuation's call (`proxy/continuation.py`), whose answer goes on in the same response; where that can't be exact,
an error event and an honest end. A whole answer has not been seen by its client, so it can always be asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any

import orjson

from proxy import http1, server_timing, sse
from proxy.answer import Answer
from proxy.client_stream import ERROR, NAMED_ERRORS, USAGE, ClientStream
from proxy.config import ProxyConfig
from proxy.continuation import (
    RECOMPUTED,
    Continuation,
    Delivered,
    NotExact,
    delivered_whole,
    is_recomputed,
    needs_ids,
    parsed_object,
)
from proxy.contracts import Order
from proxy.downstream import Downstream
from proxy.errors import Failure, ProxyError, UpstreamFailure
from proxy.flow import Flow
from proxy.http1 import ResponseHead
from proxy.legs import Legs, PassOn
from proxy.lending import Returned
from proxy.openai_api import ApiCall
from proxy.relay_thread import RelayThread
from proxy.report import Reporter
from proxy.retry import TABLE, Action, Budget, Leg
from proxy.scheduling.cost import cost_of, step_tokens
from proxy.stories import Story
from proxy.upstream import UpstreamConnection

MIN_LENT_CHUNKS = 8  # a stream that comes back sooner is not lent again
MIN_LENT_TOKENS = 16  # what a shorter answer saves is about what lending takes
MIN_MEASURED_CHUNKS = 8  # a shorter stream says little about the time of a decode step
NAMED = ("messages", "responses")  # routes whose events have names
GAVE_UP = "recomputed"
TOKENIZE_TIMEOUT_S = 5.0
BROKEN = {
    GAVE_UP: "The decode instance gave the answer up.",
    Failure.SILENT_MID_ANSWER: "The decode instance fell silent in the middle of the answer.",
    Failure.OUT_OF_TIME: "The answer was not whole in time (--total-timeout-s).",
}


class Relayer:
    def __init__(
        self, config: ProxyConfig, legs: Legs, tell: Story, reporter: Reporter, thread: RelayThread | None = None
    ) -> None:
        self._config = config
        self._thread = thread
        self._legs = legs
        self._tell = tell
        self._reporter = reporter

    def must_look(self, flow: Flow, answer: Answer) -> bool:
        """Whether an answer that came whole cannot be passed on as it is."""
        raw = answer.raw
        if RECOMPUTED in raw:
            return True
        if not answer.head.event_stream:
            return False
        if ERROR in raw or (flow.route in NAMED and any(mark in raw for mark in NAMED_ERRORS)):
            return True
        return flow.cached_tokens is not None and USAGE in raw

    # --- streams

    async def relay(self, flow: Flow, answer: Answer) -> None:
        """The client's 200, and then events as they come, from as many decoders as it takes."""
        original, decoders = flow.call, 0
        stream, opening = self._open(flow, answer)
        while (reason := await self._relay_one(flow, answer, stream, opening)) is not None:
            decoders += 1
            self._reporter.lost(flow, reason)
            rest = None
            if decoders <= self._config.max_continuations and may_continue(reason):
                rest = await self._rest(flow, original, stream, reason)
            if stream.is_finished:
                break
            if rest is None:
                self._end_broken(flow, stream, reason)
                return
            answer, opening = rest, b""
        if not flow.client.transport.is_closing():
            stream.end()
        flow.outcome = "ok"
        flow.client.answered(close=flow.close)

    def _open(self, flow: Flow, answer: Answer) -> tuple[ClientStream, bytes]:
        chunked = flow.head.version == "1.1"
        flow.close = flow.close or not chunked
        is_told = flow.headers_sent  # a keep-alive was
        flow.stop_keep_alive()
        flow.headers_sent = True
        flow.status = answer.head.status
        call, config = flow.call, self._config
        stream = ClientStream(
            flow.client.transport.write,
            chunked=chunked,
            one_choice=call.num_prompts == 1 and call.num_choices == 1,
            is_named=flow.route in NAMED,
            max_kept_bytes=config.max_continuation_bytes if config.max_continuations else -1,
            max_event_bytes=config.max_first_event_bytes,
        )
        stream.cached_tokens = flow.cached_tokens
        flow.relayed = stream
        if is_told:
            return stream, b""
        lines = http1.CHUNKED_LINE if chunked else b""
        if flow.head.server_timing:
            lines += server_timing.line(flow)
        return stream, answer.head.rebuilt(flow.id_lines, lines, flow.close)

    async def _relay_one(self, flow: Flow, answer: Answer, stream: ClientStream, opening: bytes) -> str | None:
        """One decoder's part. Returns why it is not all, or None."""
        failure = None
        stream.ids = (flow.upstream_id, flow.request_id)
        if answer.complete:
            self._reporter.whole(flow, answer)
            if not flow.client.transport.is_closing():
                stream.feed_whole(opening, answer.body)
        else:
            failure = await self._relay_connection(flow, answer.connection, answer.head, stream, opening)
        if stream.broken_by:
            return stream.broken_by
        if stream.garbled:
            return Failure.GARBAGE_MID_ANSWER.value
        return failure.value if failure is not None else None

    async def _relay_connection(
        self, flow: Flow, connection: UpstreamConnection, head: ResponseHead, stream: ClientStream, opening: bytes
    ) -> Failure | None:
        ended: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()

        def on_end(failure: Failure | None) -> None:
            if not ended.done():
                ended.set_result(failure)

        flow.client.relay_from(connection)
        if self._thread is not None and may_be_lent(flow, connection):
            stream.lend = lender(self._thread, flow.client, connection, stream)
        began = monotonic()
        try:
            connection.relay(
                lambda first: stream.begin(opening, first, head.chunked), on_end, self._config.between_tokens_timeout_s
            )
            return await ended
        finally:
            stream.lend = None
            flow.client.relay_from(None)
            flow.num_lent_chunks += connection.num_lent_chunks
            _measure_decode(flow, connection.num_chunks, began)

    async def _rest(self, flow: Flow, original: ApiCall, stream: ClientStream, reason: str) -> Answer | None:
        """The decoder's answer to the continuation, `stream` ready for it; None if there is none. Where nothing but the
        end of the stream is missing, `stream` gets it and is finished."""
        try:
            delivered = stream.delivered()
            if delivered is None:
                raise NotExact("too_long")
            if delivered.done or delivered.finish_reason is not None:
                self._finish(flow, stream, reason, delivered.done)
                return None
            await self._tokenize(flow, original, delivered)
            stream.continuation = Continuation(original, delivered, flow.prompt_tokens)
            answer = await self._told_again(flow, stream.continuation, reason)
        except NotExact as error:
            self._reporter.continuation(flow, reason, "not_exact", error.reason)
            return None
        except ProxyError as error:
            self._reporter.continuation(flow, reason, "failed", error.message)
            return None
        except PassOn as passed:
            self._reporter.continuation(flow, reason, "failed", f"status {passed.answer.status}")
            return None
        if not answer.head.event_stream:
            self._reporter.continuation(flow, reason, "failed", "not a stream")
            return None
        self._reporter.continuation(flow, reason, "continued", f"after {stream.continuation.num_tokens} tokens")
        return answer

    def _finish(self, flow: Flow, stream: ClientStream, reason: str, done: bool) -> None:
        """All text is there, and the usage is not asked for or there as well."""
        if not done and (flow.call.outline.get("stream_options") or {}).get("include_usage"):
            raise NotExact("usage_lost")
        stream.continuation = None
        stream.is_finished = True
        if not flow.client.transport.is_closing():
            stream.feed_whole(b"", b"" if done else sse.DONE)
        self._reporter.continuation(flow, reason, "ended", "only the end was missing")

    # --- whole answers

    async def whole(self, flow: Flow, answer: Answer) -> Answer:
        """`answer`, or, if the decoder gave up the KV on its way, the one that was asked for instead of it. Raises what
        a story raises."""
        original, so_far, attempts = flow.call, None, 0
        while RECOMPUTED in answer.raw or so_far is not None:
            told = parsed_object(answer.body)
            if told is None:
                break
            if so_far is not None and told.get("choices"):
                told = so_far.joined(told)
            if not is_recomputed(told):
                return answer.with_body(orjson.dumps(told)) if so_far is not None else answer
            attempts += 1
            self._reporter.lost(flow, GAVE_UP)
            if attempts > self._config.max_continuations:
                raise ProxyError(
                    503, "The decode instances gave the answer up, over and over (--max-continuations).",
                    error_type="service_unavailable", retry_after_s=1,
                )  # fmt: skip
            answer, so_far = await self._more(flow, original, told)
        return answer

    async def _more(self, flow: Flow, original: ApiCall, told: dict[str, Any]) -> tuple[Answer, Continuation | None]:
        """The rest of a whole answer, or all of it once more where its rest would not be exact."""
        try:
            delivered = delivered_whole(told)
            await self._tokenize(flow, original, delivered)
            so_far = Continuation(original, delivered, flow.prompt_tokens)
            answer = await self._told_again(flow, so_far, GAVE_UP)
        except NotExact as error:
            self._reporter.continuation(flow, GAVE_UP, "from_scratch", error.reason)
            flow.call = original
            return await self._told_again(flow, None, GAVE_UP), None
        self._reporter.continuation(flow, GAVE_UP, "continued", f"after {so_far.num_tokens} tokens")
        return answer, so_far

    async def _tokenize(self, flow: Flow, call: ApiCall, delivered: Delivered) -> None:
        """Ask the prefiller, which has the model's tokenizer, for the ids of the text where only ids can go on, and for
        their number where no prefill will have counted them before the decoder is told its limit. Raises NotExact."""
        by_ids = needs_ids(call, delivered)
        counted = delivered.is_counted or self._legs.contract.order is Order.PREFILL_FIRST
        if not delivered.text or flow.prefiller is None or (counted and not by_ids):
            return
        head = b"POST /tokenize HTTP/1.1\r\n%bX-Request-Id: %b-tokenize\r\n" % (
            flow.forwarded,
            flow.request_id.encode("ascii"),
        )
        asked = {"model": call.outline.get("model"), "prompt": delivered.text, "add_special_tokens": False}
        try:
            answer = await flow.prefiller.pool.call(head, orjson.dumps(asked), timeout_s=TOKENIZE_TIMEOUT_S)
            tokens = (parsed_object(answer.body) or {}).get("tokens") if answer.status == 200 else None
        except UpstreamFailure:
            tokens = None
        if isinstance(tokens, list) and all(type(token) is int for token in tokens):
            delivered.ids_of_text = tokens if by_ids else None
            delivered.num_tokens = max(delivered.num_tokens, 0 if counted else len(tokens))
        elif by_ids:
            raise NotExact("no_token_ids")

    # --- the story once more

    async def _told_again(self, flow: Flow, continuation: Continuation | None, reason: str) -> Answer:
        """Both legs again, under a new id and with attempts of their own. Raises ProxyError, PassOn or NotExact."""
        legs, config = self._legs, self._config
        flow.avoid = {flow.decoder} if reason != GAVE_UP and flow.decoder is not None else set()
        legs.let_go_of_decoder(flow)
        legs.give_kv_back(flow)
        flow.continuation = continuation
        if continuation is not None:
            flow.call = continuation.call
        flow.target = flow.head.target
        if flow.call.route != flow.route:
            flow.target = flow.target.replace(b"/v1/chat/completions", b"/v1/completions", 1)
        flow.cost = cost_of(flow.call)
        legs.reserve_decoder(flow)  # before the prefill: KV that no decoder can have would be stranded
        flow.prefilled = False
        flow.prefill_attempts += 1 if flow.split else 2
        flow.budget = Budget(config.max_retries, config.retry_delay)
        first_event_at, prefilled_at = flow.first_event_at, flow.prefilled_at
        try:
            return await self._tell(flow, legs)
        finally:
            flow.first_event_at, flow.prefilled_at = first_event_at, prefilled_at

    def _end_broken(self, flow: Flow, stream: ClientStream, reason: str) -> None:
        """Say so in an event where one fits, and never end as if all were there."""
        flow.outcome = reason
        self._reporter.broken(flow, reason)
        if flow.head.version == "1.1" and stream.is_whole_events:
            row = TABLE.get((Leg.DECODE, Failure(reason))) if reason in set(Failure) else None
            told = BROKEN.get(reason, "The decode instance was lost in the middle of the answer.")
            event = stream.error or sse.error_event(
                row.status if row is not None else 502, told, "upstream_error", flow.route
            )
            flow.client.write(http1.chunk(event) + http1.LAST_CHUNK)
            flow.client.answered(close=True)
        else:
            flow.client.break_off()


def may_be_lent(flow: Flow, connection: UpstreamConnection) -> bool:
    """Asked once, so that no token asks it: TLS is Python's, on either side, and so are short answers."""
    if connection.pool.tls is not None or flow.client.transport.get_extra_info("sslcontext") is not None:
        return False
    return (flow.call.max_new_tokens or MIN_LENT_TOKENS) >= MIN_LENT_TOKENS


def lender(
    thread: RelayThread, client: Downstream, connection: UpstreamConnection, stream: ClientStream
) -> Callable[[bytes, bytes], bool]:
    """What lends `stream` to `thread` wherever that can be."""

    def settle(returned: Returned) -> None:
        stream.lent_passed(returned.kept)
        if returned.unsent:
            client.write(returned.unsent)
        if returned.num_chunks < MIN_LENT_CHUNKS:
            stream.lend = None

    def lend(tail: bytes, first: bytes) -> bool:
        descriptor = client.lendable()
        return descriptor is not None and connection.lend(thread, descriptor, stream.terms(tail), first, settle)

    return lend


def may_continue(reason: str) -> bool:
    """What the table says of a failure in mid-stream; other reasons are the decoder's own words."""
    row = TABLE.get((Leg.DECODE, Failure(reason))) if reason in set(Failure) else None
    return row is None or row.action is not Action.END_ANSWER


def _measure_decode(flow: Flow, num_chunks: int, began: float) -> None:
    flow.num_chunks += num_chunks
    if num_chunks >= MIN_MEASURED_CHUNKS and flow.decoder is not None and flow.decode_load is not None:
        load = flow.decoder.load
        load.observe(step_tokens(load, flow.decode_load), (monotonic() - began) / num_chunks)

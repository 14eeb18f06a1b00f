"""The client's answer: whole, an error, or a stream relayed as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from proxy import http1, sse
from proxy.answer import Answer
from proxy.errors import Failure, ProxyError
from proxy.flow import Flow
from proxy.report import Reporter
from proxy.retry import TABLE, Leg
from proxy.scheduling.cost import step_tokens
from proxy.upstream import UpstreamConnection

MIN_MEASURED_CHUNKS = 8  # a shorter stream says little about the time of a decode step
BROKEN = {
    Failure.SILENT_MID_ANSWER: "The decode instance fell silent in the middle of the answer.",
    Failure.OUT_OF_TIME: "The answer was not whole in time (--total-timeout-s).",
}
SMALL_BYTES = 16384  # below it, joining head and body costs less than a second write


def send_whole(flow: Flow, answer: Answer) -> None:
    flow.status = answer.status
    body = answer.body
    head = answer.head.rebuilt(flow.request_id, http1.content_length_line(len(body)), flow.close)
    if len(body) < SMALL_BYTES:
        flow.client.write(head + body)
    else:
        flow.client.write(head)
        flow.client.write(body)
    flow.client.answered(close=flow.close)


def send_error(flow: Flow, error: ProxyError) -> None:
    flow.status = error.status
    flow.outcome = "refused" if error.status < 500 else "error"
    if flow.headers_sent:
        flow.client.break_off()
        return
    flow.client.write(
        http1.simple_response(
            error.status,
            error.body(flow.route),
            request_id=flow.request_id,
            close=flow.close,
            retry_after_s=error.retry_after_s,
        )
    )
    flow.client.answered(close=flow.close)


async def relay(flow: Flow, answer: Answer, between_tokens_s: float, reporter: Reporter) -> None:
    """The client's 200, and then bytes as they come until the framing says that the message has ended."""
    client, connection, head = flow.client, answer.connection, answer.head
    ended: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()

    def on_end(failure: Failure | None) -> None:
        if not ended.done():
            ended.set_result(failure)

    sink: Callable[[bytes], None] = client.transport.write
    framing = b""
    if head.chunked and flow.head.version == "1.1":
        framing = http1.CHUNKED_LINE
    elif head.content_length is not None:
        framing = http1.content_length_line(head.content_length)
    flow.close = flow.close or not framing
    flow.headers_sent = True
    flow.status = head.status
    opening = head.rebuilt(flow.request_id, framing, flow.close)
    if head.chunked and not framing:
        client.write(opening)
        sink, opening = unchunked(client.transport), b""
    client.relay_from(connection)
    try:
        connection.relay(sink, on_end, between_tokens_s, opening)
        failure = await ended
    finally:
        client.relay_from(None)
    _measure_decode(flow, connection.num_chunks)
    if failure is None:
        flow.outcome = "ok"
        client.answered(close=flow.close)
    else:
        _end_broken(flow, connection, failure, reporter)


def unchunked(transport: asyncio.WriteTransport) -> Callable[[bytes], None]:
    """A sink for a chunked body that writes its payload only, for a client that knows no chunks."""
    decoder = http1.ChunkDecoder()
    return lambda data: transport.writelines(decoder.feed(data)[0])


def _measure_decode(flow: Flow, num_chunks: int) -> None:
    flow.num_chunks = num_chunks
    if num_chunks >= MIN_MEASURED_CHUNKS and flow.decoder is not None and flow.decode_load is not None:
        load = flow.decoder.load
        load.observe(step_tokens(load, flow.decode_load), (monotonic() - flow.first_event_at) / num_chunks)


def _end_broken(flow: Flow, connection: UpstreamConnection, failure: Failure, reporter: Reporter) -> None:
    """The decoder was lost in the middle: say so in an event where one fits, and never end as if all were there."""
    flow.outcome = failure.value
    reporter.broken(flow, failure)
    if flow.head.version == "1.1" and connection.ends_well():
        status = TABLE[Leg.DECODE, failure].status
        told = BROKEN.get(failure, "The decode instance was lost in the middle of the answer.")
        event = sse.error_event(status, told, "upstream_error", flow.route)
        flow.client.write(http1.chunk(event) + http1.LAST_CHUNK)
        flow.client.answered(close=True)
    else:
        flow.client.break_off()

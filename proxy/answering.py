"""The client's answer where it comes at once: whole, or an error. `relaying.py` has those that come bit by bit."""

from __future__ import annotations

from proxy import http1, server_timing
from proxy.answer import Answer
from proxy.errors import ProxyError
from proxy.flow import Flow
from proxy.keep_alive import end_with_error

SMALL_BYTES = 16384  # below it, joining head and body costs less than a second write


def send_whole(flow: Flow, answer: Answer) -> None:
    flow.status = answer.status
    body = answer.body
    if flow.headers_sent:  # by keep-alive comments; only errors come here then
        end_with_error(flow, answer.status, body)
        return
    head = answer.head.rebuilt(flow.id_lines, _lines_for(flow, len(body)), flow.close)
    if len(body) < SMALL_BYTES:
        flow.client.write(head + body)
    else:
        flow.client.write(head)
        flow.client.write(body)
    flow.client.answered(close=flow.close)


def _lines_for(flow: Flow, num_bytes: int) -> bytes:
    framing = http1.content_length_line(num_bytes)
    return framing + server_timing.line(flow) if flow.head.server_timing else framing


def send_error(flow: Flow, error: ProxyError) -> None:
    flow.status = error.status
    flow.outcome = "refused" if error.status < 500 else "error"
    if flow.headers_sent:
        if flow.keep_alive is not None:
            end_with_error(flow, error.status, error.body(flow.route))
        else:
            flow.client.break_off()
        return
    flow.client.write(
        http1.simple_response(
            error.status,
            error.body(flow.route),
            id_lines=flow.id_lines,
            close=flow.close,
            retry_after_s=error.retry_after_s,
            more_lines=server_timing.line(flow),
        )
    )
    flow.client.answered(close=flow.close)

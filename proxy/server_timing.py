"""The `Server-Timing` line of an answer (W3C Server Timing): where its time went, in milliseconds, as far as it is
known when the head is written, which for a stream is at the decoder's first event.

It is written for a request that asks with `X-Server-Timing: 1`, for all, or never (`--server-timing`).
"""

from __future__ import annotations

from time import monotonic

from proxy.config import ServerTiming
from proxy.flow import Flow

NONE, TIMES, TIMES_AND_NAMES = range(3)


def levels(when: ServerTiming, with_instances: bool) -> tuple[int, int]:
    """How much is told: (to a request that did not ask, to one that did)."""
    told = TIMES_AND_NAMES if with_instances else TIMES
    return (told if when == "always" else NONE, NONE if when == "off" else told)


def line(flow: Flow) -> bytes:
    """The header line; empty where it is not wanted."""
    level = flow.head.server_timing
    if not level:
        return b""
    return b"Server-Timing: %b\r\n" % ", ".join(_metrics(flow, level, monotonic())).encode("ascii", "replace")


def _metrics(flow: Flow, level: int, now: float) -> list[str]:
    arrived, sent, prefilled, first = flow.arrived, flow.sent_at, flow.prefilled_at, flow.first_event_at
    parts = []
    if sent:
        parts.append(_dur("queue", sent - arrived))
    if prefilled:
        parts.append(_dur("prefill", prefilled - sent, flow.prefiller.key if flow.prefiller is not None else "", level))
    if first:
        name = "handoff" if flow.stream else "decode"  # of an answer that comes whole, the end is all that is seen
        parts.append(
            _dur(name, first - (prefilled or sent), flow.decoder.key if flow.decoder is not None else "", level)
        )
    parts.append(_dur("ttft", first - arrived) if first and flow.stream else _dur("total", now - arrived))
    return parts


def _dur(name: str, seconds: float, instance: str = "", level: int = TIMES) -> str:
    named = f';desc="{instance}"' if instance and level == TIMES_AND_NAMES else ""
    return f"{name}{named};dur={max(seconds, 0.0) * 1000:.1f}"

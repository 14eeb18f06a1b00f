"""What is written down of each request: metrics and one line of access log. Numbers and reasons, never a prompt."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from proxy.access_log import AccessLog
from proxy.answer import Answer
from proxy.continuation import Delivered, NotExact, delivered_in
from proxy.errors import Failure, UpstreamFailure
from proxy.flow import Flow
from proxy.instance import Instance
from proxy.metrics import ProxyMetrics
from proxy.retry import Action, Leg

log = logging.getLogger(__name__)

NOT_PICKED = (None, None, None)
_OUTPUT_TOKENS = re.compile(rb'"\w+"\s*:\s*(\d+)')
_USAGE_BYTES = 1024  # at the end of an answer: where engines write the usage


class Reporter:
    """`explains`: whether the access log wants to know why an instance was picked."""

    def __init__(self, metrics: ProxyMetrics, access_log: AccessLog) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self.explains = access_log.enabled
        self.recompute = metrics.recompute
        self.prefilled = metrics.prefill.observe

    def ended(self, flow: Flow, now: float) -> None:
        metrics = self._metrics
        if flow.outcome == "upstream_error" and flow.status < 500:  # the instance's word, but the client's fault
            flow.outcome = "client_error"
        stream, is_child = flow.stream, flow.is_child
        route = "child" if is_child else flow.route
        metrics.requests[route, "stream" if stream else "whole", flow.status, flow.outcome] += 1
        arrived, first = flow.arrived, flow.first_event_at
        if flow.sent_at:
            metrics.queue.observe(flow.sent_at - arrived)
        if first and stream:
            if flow.prefilled_at:
                metrics.handoff.observe(first - flow.prefilled_at)
            if not is_child:
                metrics.ttft.observe(first - arrived)
            if flow.num_chunks > 1:
                metrics.tpot.observe((now - first) / flow.num_chunks)
            metrics.stream_events += flow.num_chunks
            metrics.lent_stream_events += flow.num_lent_chunks
        if not is_child and (first or flow.outcome == "ok"):
            metrics.e2e.observe(now - arrived)
        if flow.prompt_tokens:
            metrics.prompt_tokens += flow.prompt_tokens
            metrics.cached_prompt_tokens += flow.cached_tokens or 0
        if self._access_log.enabled:
            self._note(flow, route, now)

    def _note(self, flow: Flow, route: str, now: float) -> None:
        arrived, sent, prefilled, first = flow.arrived, flow.sent_at, flow.prefilled_at, flow.first_event_at
        call = getattr(flow, "call", None)  # there is none where the body could not be read
        stream = flow.stream
        self._access_log.add(
            (
                flow.request_id,
                route,
                self._access_log.word(call.outline.get("model") if call is not None else None),
                1 if stream else 0,
                flow.status,
                flow.outcome,
                flow.prompt_tokens or (call.num_prompt_tokens if call is not None else None),
                num_output_tokens_of(flow),
                sent - arrived if sent else None,
                prefilled - sent if prefilled else None,
                first - prefilled if stream and first and prefilled else None,
                first - arrived if stream and first else None,
                now - arrived,
                flow.prefiller.key if flow.prefiller is not None else None,
                flow.decoder.key if flow.decoder is not None else None,
                flow.budget.num_retries,
                0 if flow.continuation is None else 1,
                *(flow.prefill_reason or NOT_PICKED),
                *(flow.decode_reason or NOT_PICKED),
            )
        )

    def whole(self, flow: Flow, answer: Answer) -> None:
        """The answer came whole and is about to be sent."""
        if self._access_log.enabled:
            raw = answer.raw
            flow.num_output_tokens = output_tokens_of(raw)
            if flow.num_output_tokens is None and answer.head.event_stream:
                flow.num_output_tokens = num_ids_of(flow, lambda: delivered_in(answer.body)) or raw.count(b"\n\n")

    def refused(self, status: int, request_id: str | None) -> None:
        """A request that could not be read."""
        self._metrics.refused(status)
        self._brief(request_id, "none", status, "refused", None)

    def passed(self, request_id: str, status: int, outcome: str, seconds: float) -> None:
        """A request on a route that is not the proxy's own."""
        self._metrics.requests["passed", "whole", status, outcome] += 1
        self._brief(request_id, "passed", status, outcome, seconds)

    def _brief(self, request_id: str | None, route: str, status: int, outcome: str, seconds: float | None) -> None:
        log = self._access_log
        if log.enabled:
            known = (log.word(request_id), route, log.word(None), 0, status, outcome, *(None,) * 6, seconds)
            log.add((*known, None, None, 0, 0, *NOT_PICKED, *NOT_PICKED))

    def failed(self, flow: Flow, leg: Leg, instance: Instance, failure: UpstreamFailure, action: Action) -> None:
        kind = failure.failure.value
        self._metrics.retries[leg.value, kind, action.value] += 1
        instance.failures[kind] += 1
        level = logging.INFO if failure.failure is Failure.CLIENT_ERROR else logging.WARNING
        log.log(
            level,
            "event=leg_failed request_id=%s leg=%s instance=%s failure=%s action=%s reason=%r",
            flow.request_id, leg.value, instance.key, kind, action.value, failure.message,
        )  # fmt: skip

    def lost(self, flow: Flow, reason: str) -> None:
        """The decoder's part of the answer has ended before the answer has."""
        if flow.decoder is not None and reason != Failure.OUT_OF_TIME:  # that is the request's own limit
            flow.decoder.failures[reason] += 1

    def continuation(self, flow: Flow, reason: str, outcome: str, told: str) -> None:
        self._metrics.continuations[reason, outcome] += 1
        if outcome not in ("not_exact", "failed"):  # those end the answer, and are counted by `broken`
            self._metrics.retries[Leg.DECODE.value, reason, Action.CONTINUE.value] += 1
        log.warning(
            "event=answer_continuation request_id=%s reason=%s outcome=%s decoder=%s told=%r",
            flow.request_id, reason, outcome, flow.decoder.key if flow.decoder else "-", told,
        )  # fmt: skip

    def broken(self, flow: Flow, failure: str) -> None:
        self._metrics.retries[Leg.DECODE.value, failure, Action.END_ANSWER.value] += 1
        decoder = flow.decoder.key if flow.decoder else "-"
        log.warning("event=answer_broken request_id=%s decoder=%s failure=%s", flow.request_id, decoder, failure)

    def came_back(self, instance: Instance) -> None:
        log.warning("event=instance_back role=%s instance=%s", instance.role.value, instance.key)

    def went_out(self, instance: Instance) -> None:
        log.warning(
            "event=instance_out role=%s instance=%s reason=%r",
            instance.role.value, instance.key, instance.health.last_error,
        )  # fmt: skip


def num_output_tokens_of(flow: Flow) -> int | None:
    """Of a stream by the usage at its end, the ids in its events, or the number of its events: the first that it has.
    Of one that was divided the sum of its children's."""
    if flow.children:
        return sum(num_output_tokens_of(child) or 0 for child in flow.children) or None
    if flow.relayed is None:
        return flow.num_output_tokens
    told = output_tokens_of(flow.relayed.last_reads)
    if told is not None:
        return told
    return num_ids_of(flow, flow.relayed.delivered) or flow.num_chunks or flow.num_output_tokens


def num_ids_of(flow: Flow, deliver: Callable[[], Delivered | None]) -> int:
    """How many token ids came, where the client asked for them; 0 where that is not known."""
    call = getattr(flow, "call", None)
    if call is None or not call.outline.get("return_token_ids"):
        return 0
    try:
        delivered = deliver()
    except NotExact:
        return 0
    return delivered.num_tokens if delivered is not None and delivered.is_counted else 0


def output_tokens_of(answer: bytes) -> int | None:
    """How many tokens a whole answer has by its usage; None where it is not found near the end."""
    at = answer.rfind(b'"completion_tokens"', -_USAGE_BYTES)
    if at < 0:
        at = answer.rfind(b'"output_tokens"', -_USAGE_BYTES)
    found = _OUTPUT_TOKENS.match(answer, at) if at >= 0 else None
    return int(found[1]) if found else None

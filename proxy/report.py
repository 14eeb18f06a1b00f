"""What is written down of each request: metrics and one line of access log. Numbers and reasons, never a prompt."""

from __future__ import annotations

import logging

from proxy.access_log import AccessLog
from proxy.errors import Failure, UpstreamFailure
from proxy.flow import Flow
from proxy.instance import Instance
from proxy.metrics import ProxyMetrics
from proxy.retry import Action, Leg

log = logging.getLogger(__name__)


class Reporter:
    def __init__(self, metrics: ProxyMetrics, access_log: AccessLog) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self.recompute = metrics.recompute
        self.prefilled = metrics.prefill.observe

    def ended(self, flow: Flow, now: float) -> None:
        metrics = self._metrics
        if flow.outcome == "upstream_error" and flow.status < 500:  # the instance's word, but the client's fault
            flow.outcome = "client_error"
        stream = flow.stream
        route = "child" if flow.is_child else flow.route
        metrics.requests[route, "stream" if stream else "whole", flow.status, flow.outcome] += 1
        arrived, first = flow.arrived, flow.first_event_at
        if flow.sent_at:
            metrics.queue.observe(flow.sent_at - arrived)
        if first:
            metrics.e2e.observe(now - arrived)
            if flow.prefilled_at:
                metrics.handoff.observe(first - flow.prefilled_at)
            if stream:
                metrics.ttft.observe(first - arrived)
                if flow.num_chunks > 1:
                    metrics.tpot.observe((now - first) / flow.num_chunks)
        if self._access_log.enabled:
            self._access_log.add(
                f"request_id={flow.request_id} route={route} stream={stream:d} status={flow.status} "
                f"outcome={flow.outcome} prefiller={flow.prefiller.key if flow.prefiller else '-'} "
                f"decoder={flow.decoder.key if flow.decoder else '-'} retries={flow.budget.num_retries} "
                f"prefill_ms={_ms(flow.sent_at, flow.prefilled_at)} first_ms={_ms(arrived, first)} "
                f"total_ms={_ms(arrived, now)}"
            )

    def failed(self, flow: Flow, leg: Leg, instance: Instance, failure: UpstreamFailure, action: Action) -> None:
        self._metrics.retries[leg.value, failure.failure.value, action.value] += 1
        level = logging.INFO if failure.failure is Failure.CLIENT_ERROR else logging.WARNING
        log.log(
            level,
            "event=leg_failed request_id=%s leg=%s instance=%s failure=%s action=%s reason=%r",
            flow.request_id, leg.value, instance.key, failure.failure.value, action.value, failure.message,
        )  # fmt: skip

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


def _ms(start: float, end: float) -> str:
    return f"{(end - start) * 1000:.1f}" if start and end else "-"

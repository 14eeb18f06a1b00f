"""Every metric family of the proxy, declared once: the exposition, `docs/metrics.md` and the tests are made from this.

Names follow Prometheus: base units (seconds, bytes, tokens), `_total` on counters, and only labels whose values are
bounded by the configuration or by a list of ours. An engine's label is `address`, for `instance` is Prometheus' own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Merged = Literal["sum", "max", "min", "mean"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TPOT_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)  # fmt: skip
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ENGINE = ("role", "address")


class Family(NamedTuple):
    """`name` is the whole name; `merged` says how the families of several worker processes become one."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    merged: Merged = "sum"
    bounds: tuple[float, ...] = ()


_COUNTERS = (
    Family(
        "pd_proxy_requests_total",
        "counter",
        "Requests that ended. Routes: completions, chat, responses, messages; child, a part of a divided request; "
        "passed, any route that is not the proxy's own; none, what could not be read. Status 0: nothing was sent",
        ("route", "mode", "status", "outcome"),
    ),
    Family("pd_proxy_retries_total", "counter", "What followed failures of a leg", ("leg", "failure", "action")),
    Family(
        "pd_proxy_continuations_total",
        "counter",
        "Answers whose decoder was lost or gave up in the middle, by what came of it",
        ("reason", "outcome"),
    ),
    Family(
        "pd_proxy_decoder_recomputes_total",
        "counter",
        "Requests whose prompt the decoder computed itself",
        ("reason",),
    ),
    Family(
        "pd_proxy_metaserver_calls_total",
        "counter",
        "Calls of layerwise decoders by what they were answered",
        ("outcome",),
    ),
    Family(
        "pd_proxy_admission_rejected_total",
        "counter",
        "Requests no decoder had room for: full, the queue was; too_late, it waited for --queue-timeout-s",
        ("reason",),
    ),
    Family("pd_proxy_prompt_tokens_total", "counter", "Tokens of prompts, as the prefillers' answers count them"),
    Family("pd_proxy_cached_prompt_tokens_total", "counter", "Those of them that a prefiller had in its caches"),
    Family("pd_proxy_stream_events_total", "counter", "Events relayed of streams, about one a token"),
    Family("pd_proxy_lent_stream_events_total", "counter", "Those of them that the relay thread passed on"),
    Family(
        "pd_proxy_kv_total",
        "counter",
        "KV of prefillers: handed_out, then consumed by a decoder, reclaimed, or orphaned (left to the engine's "
        "time-out)",
        ("event",),
    ),
)
_HISTOGRAMS = (
    Family("pd_proxy_queue_seconds", "histogram", "From the request's last byte to sending its first leg"),
    Family("pd_proxy_prefill_seconds", "histogram", "From sending a prefill to its answer"),
    Family("pd_proxy_handoff_seconds", "histogram", "From the prefill's answer to the decoder's first event, streams"),
    Family("pd_proxy_ttft_seconds", "histogram", "From the request's last byte to the first event, streams"),
    Family("pd_proxy_tpot_seconds", "histogram", "Mean time between the events of a stream", bounds=_TPOT_SECONDS),
    Family("pd_proxy_e2e_seconds", "histogram", "From the request's last byte to the answer's"),
    Family(
        "pd_proxy_loop_lag_seconds",
        "histogram",
        "How late the event loop was for its timer, four times a second",
        bounds=_LAG_SECONDS,
    ),
)
_GAUGES = (
    Family("pd_proxy_requests_in_flight", "gauge", "Requests being served"),
    Family("pd_proxy_requests_waiting", "gauge", "Requests that wait for room on a decoder"),
    Family("pd_proxy_client_connections", "gauge", "Connections of clients"),
    Family(
        "pd_proxy_kv_open",
        "gauge",
        "KV handed out that no decoder is known to have: held, or reclaiming (being given back)",
        ("state",),
    ),
    Family(
        "pd_proxy_instances",
        "gauge",
        "Instances: ready, out (its health), draining (told to leave), waiting (added, no answer yet)",
        ("role", "state"),
        "max",
    ),
    Family("pd_proxy_build_info", "gauge", "1, with what runs as labels", ("version", "python"), "max"),
)
_INSTANCES = (
    Family("pd_proxy_instance_requests", "gauge", "Requests open on the instance", _ENGINE),
    Family("pd_proxy_instance_load_tokens", "gauge", "Work open on the instance", _ENGINE),
    Family(
        "pd_proxy_instance_queue_seconds",
        "gauge",
        "That work over the speed shown: on a prefiller, what a new prompt waits; on a decoder, what it adds to a step",
        _ENGINE,
    ),
    Family("pd_proxy_instance_kv_held", "gauge", "KV the prefiller handed out and no decoder has fetched", _ENGINE),
    Family("pd_proxy_instance_kv_tokens", "gauge", "Tokens of KV reserved on a decoder", _ENGINE),
    Family("pd_proxy_instance_kv_tokens_limit", "gauge", "Tokens of KV it can hold; 0: unknown", _ENGINE, "max"),
    Family("pd_proxy_instance_speed_tokens_per_second", "gauge", "Speed it has shown", _ENGINE, "mean"),
    Family("pd_proxy_instance_healthy", "gauge", "1 if the evidence says it is well", _ENGINE, "min"),
    Family("pd_proxy_instance_enabled", "gauge", "1 if the operator wants it used", _ENGINE, "min"),
    Family("pd_proxy_instance_connections_active", "gauge", "Connections with a request", _ENGINE),
    Family("pd_proxy_instance_connections_idle", "gauge", "Connections kept for later", _ENGINE),
    Family("pd_proxy_instance_picks_total", "counter", "How often it was chosen", _ENGINE),
    Family(
        "pd_proxy_instance_failures_total",
        "counter",
        "Legs that failed on it, in mid-answer too",
        (*_ENGINE, "failure"),
    ),
)
# prometheus_client's own, on Linux
_PROCESS = (
    Family("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes."),
    Family("process_resident_memory_bytes", "gauge", "Resident memory size in bytes."),
    Family(
        "process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", merged="min"
    ),
    Family("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds."),
    Family("process_open_fds", "gauge", "Number of open file descriptors."),
    Family("process_max_fds", "gauge", "Maximum number of open file descriptors.", merged="max"),
)
OURS = {one.name: one for one in (*_COUNTERS, *_HISTOGRAMS, *_GAUGES, *_INSTANCES)}
FAMILIES = {**OURS, **{one.name: one for one in _PROCESS}}


def bounds_of(name: str) -> tuple[float, ...]:
    return FAMILIES[name].bounds or _SECONDS

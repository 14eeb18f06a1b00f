"""`docs/metrics.md`, made from what proxy and sidecar declare: `python -m tests.metrics_page > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client.metrics import MetricWrapperBase

from proxy.access_log import FIELDS
from proxy.metric_families import FAMILIES, bounds_of
from sidecar.metrics import SidecarMetrics
from sidecar.store.metrics import StoreMetrics

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
OPENING = """\
# Seeing what happens

The tables are made from the code; a test holds them, the README's and the exposition against each other. All is ready
to use in `configs/prometheus/`: a scrape file, alert rules with what to do about each, and a Grafana dashboard.

## The proxy's `GET /metrics`

Label values are bounded: by the configuration (`role`, `address`) or by lists in the code. A route the proxy does not
know is `passed`, and what could not be read is `none`; no label holds what a client sent. An engine's label is
`address`, because `instance` is Prometheus' own for what it scrapes. With `--workers`, counters, histograms and most
gauges are added up; the last column names those that are not, because each worker sees the same of them.
"""
SIDECAR = """
## The sidecar's `GET /metrics` (`--metrics-port`)
"""
CLOSING = """
## Access log

One line a request on stderr when it has ended, as `key=value` (`--access-log text`, the default), as a JSON object
(`json`) or none (`off`). With a `--log-level` above INFO there is none unless `--access-log` is given. The fields, in
this order, and in JSON after `time` and `event`:

{fields}

What is unknown or was not reached is `-`, or `null`. Seconds are those of the histograms of the same names: `queue_s`
until the first leg is sent, `prefill_s` from then to the prefill's answer (failed attempts included), `handoff_s` from
there to the decoder's first event, `ttft_s` until that event, `e2e_s` until the end. `prompt_tokens` is the prefiller's
count, or an estimate from the body's bytes; `output_tokens` is what a whole answer's usage says, and the events of a
stream. Why an instance was picked: `prefill_choice` and `decode_choice` name what decided (the policy; `prefix` or
`session` where a policy has more to go by; `only_one` where there was no choice), and `*_wait_s` and `*_next_wait_s`
are the expected waits, by the formula of `least_load` whatever the policy, on the chosen instance and on the best of
the others. A prompt is never written; a model's name that is not one plain word is written in quotes with escapes.
A divided request has a line of its own and one for each child (`route=child`, its id with `-c` and a number behind).
The proxy's own routes (`/metrics`, `/health`, `/instances`, ...) write none.

## Server-Timing

A request that asks by `X-Server-Timing: 1` gets a `Server-Timing` line on its answer, in milliseconds: `queue`,
`prefill`, `handoff` and `ttft` of a stream (its head is written at the decoder's first event, when they are known);
`queue`, `prefill`, `decode` and `total` of an answer that comes whole; `total` of an error. `--server-timing always`
writes it for all, `off` for none. `--server-timing-instances` adds the addresses of the prefiller and the decoder,
which otherwise stay inside. The times of a divided request are those of one of its children.

## Status page

`GET /` or `/status`: the instances with role, state, health, load, queue, KV and last error, and sums, every two
seconds from `GET /instances`. It loads nothing from elsewhere.
"""


class Shown(NamedTuple):
    kind: str
    labels: tuple[str, ...]


def proxy_families() -> dict[str, Shown]:
    return {name: Shown(one.kind, one.labels) for name, one in FAMILIES.items()}


def sidecar_families() -> dict[str, Shown]:
    return {name: Shown(kind, labels) for name, kind, labels, _ in _sidecar_rows()}


def _sidecar_rows() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    sidecar = SidecarMetrics()
    for one in (*vars(sidecar).values(), *vars(StoreMetrics(sidecar.registry)).values()):
        if isinstance(one, MetricWrapperBase):
            (family,) = one.describe()
            name = family.name + ("_total" if family.type == "counter" else "")
            yield name, family.type, tuple(one._labelnames), family.documentation.rstrip(".")


def rendered() -> str:
    lines = [OPENING, "| Metric | Kind | Labels | What it says | Workers |", "|---|---|---|---|---|"]
    for one in FAMILIES.values():
        merged = "" if one.merged == "sum" else one.merged
        lines.append(f"| `{one.name}` | {one.kind} | {_words(one.labels)} | {one.text.rstrip('.')} | {merged} |")
    bounds = {one.name: bounds_of(one.name) for one in FAMILIES.values() if one.kind == "histogram"}
    lines += ["", "Bounds of the histograms, in seconds:", ""]
    for group in dict.fromkeys(bounds.values()):
        names = ", ".join(f"`{name}`" for name, own in bounds.items() if own == group)
        lines.append(f"- {names}: {', '.join(f'{bound:g}' for bound in group)}")
    lines += [SIDECAR, "| Metric | Kind | Labels | What it says |", "|---|---|---|---|"]
    for name, kind, labels, text in _sidecar_rows():
        lines.append(f"| `{name}` | {kind} | {_words(labels)} | {text} |")
    return "\n".join(lines) + "\n" + CLOSING.format(fields=_wrapped([f"`{name}`" for name in FIELDS]))


def _words(labels: tuple[str, ...]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def _wrapped(words: list[str], width: int = 118) -> str:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += word + ", "
    return "\n".join(line.rstrip() for line in lines).rstrip(",")


if __name__ == "__main__":
    print(rendered(), end="")

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.access_log import AccessLog
from proxy.metric_families import FAMILIES, bounds_of
from proxy.metrics import Histogram
from tests.unit.proxy.client import COMPLETIONS, ask, fields_of
from tests.unit.proxy.conftest import Setup, Start

TTFT = "pd_proxy_ttft_seconds"


def samples_of(setup: Setup) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, in the order they are declared."""
    found = {}
    for family in text_string_to_metric_families(setup.app.metrics.exposition().decode()):
        declared = FAMILIES[family.name + ("_total" if family.type == "counter" else "")].labels
        for sample in family.samples:
            names = [*declared, *(["le"] if sample.name.endswith("_bucket") else [])]
            found[(sample.name, *(sample.labels[name] for name in names))] = sample.value
    return found


def test_a_histogram_counts_up_to_and_with_each_bound() -> None:
    histogram = Histogram(TTFT)
    bounds = bounds_of(TTFT)
    for seconds in (0.0, bounds[0], bounds[0] * 1.01, bounds[-1], bounds[-1] + 1):
        histogram.observe(seconds)
    buckets = dict(histogram.buckets())
    assert buckets[str(bounds[0])] == 2 and buckets[str(bounds[1])] == 3
    assert buckets[str(bounds[-1])] == 4 and buckets["+Inf"] == 5
    assert histogram.total == pytest.approx(2.01 * bounds[0] + 2 * bounds[-1] + 1)
    assert list(buckets.values()) == sorted(buckets.values())


async def test_every_family_is_exposed_with_its_words(start: Start) -> None:
    setup = await start()
    shown = text_string_to_metric_families(setup.app.metrics.exposition().decode())
    told = {one.name + ("_total" if one.type == "counter" else ""): (one.type, one.documentation) for one in shown}
    assert told == {name: (one.kind, one.text) for name, one in FAMILIES.items()}


async def test_what_a_whole_answer_took_is_no_first_token(start: Start) -> None:
    setup = await start()
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    await setup.settled()
    samples = samples_of(setup)
    assert samples["pd_proxy_e2e_seconds_count",] == samples["pd_proxy_prefill_seconds_count",] == 1
    for name in ("ttft", "handoff", "tpot"):
        assert samples[f"pd_proxy_{name}_seconds_count",] == 0


async def test_a_divided_request_is_one_to_its_client(start: Start) -> None:
    setup = await start()
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, n=3, stream=True))
    await setup.settled()
    samples = samples_of(setup)
    assert samples["pd_proxy_requests_total", "completions", "stream", "200", "ok"] == 1
    assert samples["pd_proxy_requests_total", "child", "stream", "200", "ok"] == 3
    assert samples["pd_proxy_ttft_seconds_count",] == samples["pd_proxy_e2e_seconds_count",] == 1
    assert samples["pd_proxy_handoff_seconds_count",] == samples["pd_proxy_tpot_seconds_count",] == 3


async def test_failures_are_counted_where_they_were(start: Start) -> None:
    setup = await start(2)
    setup.p.script = ["status:500"]
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    await setup.settled()
    samples = samples_of(setup)
    p, other = (f"127.0.0.1:{one.port}" for one in setup.prefillers)
    assert samples["pd_proxy_instance_failures_total", "prefill", p, "server_error"] == 1
    assert not any(key[0] == "pd_proxy_instance_failures_total" and key[2] == other for key in samples)
    assert samples["pd_proxy_retries_total", "prefill", "server_error", "other_prefiller"] == 1


async def test_instances_by_state(start: Start) -> None:
    setup = await start(2, 1)
    prefillers = setup.app.fleet.all[:2]
    prefillers[0].health.healthy = False
    prefillers[1].enabled = False
    samples = samples_of(setup)
    states = {(role, state): samples["pd_proxy_instances", role, state] for role in ("prefill", "decode")
              for state in ("ready", "out", "draining", "waiting")}  # fmt: skip
    assert {key for key, value in states.items() if value} == {
        ("prefill", "out"), ("prefill", "draining"), ("decode", "ready"),
    }  # fmt: skip
    assert all(value in (0, 1) for value in states.values())
    prefillers[0].health.healthy = prefillers[1].enabled = True


async def test_nothing_is_explained_where_nobody_reads_it(start: Start) -> None:
    setup = await start(access_log="off")
    assert not setup.app._reporter.explains
    assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200
    assert not AccessLog("off").enabled


async def test_a_decoder_that_is_lost_in_the_middle_is_counted(start: Start) -> None:
    setup = await start(1, 2)
    for decoder in setup.decoders:
        decoder.script = ["mid_reset"]
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, stream=True))
    assert answer.status == 200
    await setup.settled()
    samples = samples_of(setup)
    lost = [value for key, value in samples.items() if key[0] == "pd_proxy_instance_failures_total"]
    assert sum(lost) >= 1 and sum(value for key, value in samples.items() if key[0] == "pd_proxy_continuations_total")
    assert all(key[3] == "lost_mid_answer" for key in samples if key[0] == "pd_proxy_instance_failures_total")

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from engine_adapter.torch_engine.kv_transfer import PullResult
from engine_adapter.torch_engine.metrics import ServerMetrics
from engine_adapter.torch_engine.prefix_store import LoadResult
from tests.unit.engine_adapter.torch_engine.server.fake_engine import ScriptedEngine


def samples(metrics: ServerMetrics) -> dict[tuple[str, str], float]:
    """Values by name and labels other than model_name, which every vllm: family has."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert not sample.name.startswith("vllm:") or labels.pop("model_name") == "tiny"
            labels.pop("model_name", None)
            found[sample.name, ",".join(value for _, value in sorted(labels.items(), reverse=True))] = sample.value
    return found


def test_the_engines_counters_under_vllms_names() -> None:
    found = samples(ServerMetrics("tiny", ScriptedEngine().stats, with_process=False))
    assert found["vllm:num_requests_running", ""] == 0
    assert found["vllm:num_requests_waiting", ""] == 0
    assert found["vllm:kv_cache_usage_perc", ""] == 0.0625
    assert found["vllm:prompt_tokens_total", ""] == 15
    assert found["vllm:generation_tokens_total", ""] == 11
    assert found["vllm:num_preemptions_total", ""] == 2
    assert found["vllm:prompt_tokens_by_source_total", "local_compute"] == 7
    assert found["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == 5
    assert found["vllm:prompt_tokens_by_source_total", "external_kv_transfer"] == 3
    assert found["vllm:cache_config_info", "64,16"] == 1
    assert found["baton_engine_free_blocks", ""] == 60
    assert found["baton_engine_blocks_held_by_offers", ""] == 4


def test_observations() -> None:
    metrics = ServerMetrics("tiny", ScriptedEngine().stats, with_process=False)
    metrics.observe_first_token(0.3)
    metrics.observe_token_gap(0.004)
    metrics.observe_token_gap(0.02)
    metrics.observe_finished("stop", 1.2, 10, 3)
    metrics.observe_aborted()
    found = samples(metrics)
    assert found["vllm:time_to_first_token_seconds_count", ""] == 1
    assert found["vllm:time_per_output_token_seconds_count", ""] == 2
    assert found["vllm:inter_token_latency_seconds_sum", ""] == 0.024
    assert found["vllm:e2e_request_latency_seconds_sum", ""] == 1.2
    assert found["vllm:request_success_total", "stop"] == 1
    assert found["vllm:request_success_total", "abort"] == 1
    assert found["vllm:request_success_total", "length"] == 0


def test_pulls_by_transport_and_peer() -> None:
    metrics = ServerMetrics("tiny", ScriptedEngine().stats, with_process=False)
    for peer in ("p1", "p1", "p2"):
        metrics.observe_pull(PullResult("r", True, "", "", 3, 300, 0.01, "shm", peer))
    metrics.observe_pull(PullResult("r", False, "expired"))
    found = samples(metrics)
    assert found["baton_engine_kv_pull_bytes_total", "shm,p1"] == 600
    assert found["baton_engine_kv_pull_blocks_total", "shm,p2"] == 3
    assert found["baton_engine_kv_pulls_total", "ok"] == 3
    assert found["baton_engine_kv_pulls_total", "expired"] == 1
    assert found["baton_engine_kv_pull_seconds_count", "shm"] == 3


def test_a_bound_belongs_to_its_bucket() -> None:
    metrics = ServerMetrics("tiny", ScriptedEngine().stats, with_process=False)
    metrics.observe_token_gap(0.001)
    metrics.observe_token_gap(0.0010001)
    metrics.observe_token_gap(1000.0)
    found = samples(metrics)
    name = "vllm:inter_token_latency_seconds_bucket"
    assert (found[name, "0.001"], found[name, "0.0025"], found[name, "80.0"], found[name, "+Inf"]) == (1, 2, 2, 3)


def test_loads_out_of_the_store_by_tier() -> None:
    metrics = ServerMetrics("tiny", ScriptedEngine().stats, with_process=False)
    metrics.observe_load(LoadResult("a", 5, "", 500, 0.01, {"memory": 2, "posix": 3}))
    metrics.observe_load(LoadResult("b", 1, "missing", 100, 0.01, {"posix": 1}))
    found = samples(metrics)
    assert found["baton_engine_store_loads_total", "ok"] == 1
    assert found["baton_engine_store_loads_total", "missing"] == 1
    assert found["baton_engine_store_load_blocks_total", "posix"] == 4
    assert found["baton_engine_store_load_blocks_total", "memory"] == 2
    assert found["baton_engine_store_load_bytes_total", ""] == 600
    assert found["baton_engine_store_load_seconds_count", ""] == 2

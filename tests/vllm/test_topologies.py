"""Two of each, and a prefix tier of vLLM's own beside our connector."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.servers import baton, eventually, proxy_server, running, vllm_server
from tests.vllm.splits import Split, by_source, prefiller_with_tier, same_answers, tier_is_used, used

pytestmark = pytest.mark.timeout(900)


def test_two_prefillers_and_two_decoders(split: Split, model: Path, tmp_path: Path) -> None:
    prefiller = vllm_server("prefiller-2", model, tmp_path, baton("kv_producer", lease_s=20))
    decoder = vllm_server("decoder-2", model, tmp_path, baton("kv_consumer"))
    prefillers, decoders = [split.prefiller, prefiller], [split.decoder, decoder]
    proxy = proxy_server(prefillers, decoders, tmp_path, "--policy", "round_robin")
    with running(prefiller, decoder), running(proxy):
        before = [by_source(one, "external_kv_transfer") for one in decoders]
        same_answers(proxy, split.unsplit, 9000)
        after = [by_source(one, "external_kv_transfer") for one in decoders]
        assert all(late > early for early, late in zip(before, after, strict=True))  # each decoder had its share
        assert prefiller.metric("vllm:prompt_tokens_total") > 0
        assert eventually(lambda: all(used(one) == 0 for one in (*prefillers, *decoders)))


def test_beside_a_prefix_tier_in_a_multi_connector(split: Split, model: Path, tmp_path: Path) -> None:
    prefiller = prefiller_with_tier("prefiller-multi", model, tmp_path, lease_s=20)
    proxy = proxy_server([prefiller], [split.decoder], tmp_path)
    with running(prefiller), running(proxy):
        tier_is_used(Split(prefiller, split.decoder, proxy, split.unsplit), 9100)

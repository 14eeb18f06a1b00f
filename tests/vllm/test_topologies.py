"""Two of each, and a prefix tier of vLLM's own beside our connector."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.conftest import Split
from tests.vllm.servers import Ask, Server, baton, eventually, post, proxy_server, running, vllm_server
from tests.vllm.test_split import LENGTHS, by_source, prompt, used

pytestmark = pytest.mark.timeout(900)


def same_answers(split: Server, unsplit: Server, seed: int) -> None:
    """Greedy text, chat and completion, streamed and not."""
    for number, length in enumerate(LENGTHS):
        text, chat, stream = prompt(length, seed + number), number % 2 == 1, number % 3 == 0
        assert Ask(text, chat, stream).text(split) == Ask(text, chat).text(unsplit)


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
    """vLLM's ExampleConnector keeps what was prefilled in a directory; ours hands it on."""
    tier = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "tier")},
    }
    several = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"connectors": [baton("kv_producer", lease_s=20), tier]},
    }
    prefiller = vllm_server("prefiller-multi", model, tmp_path, several, "--no-enable-prefix-caching")
    proxy = proxy_server([prefiller], [split.decoder], tmp_path)
    with running(prefiller), running(proxy):
        same_answers(proxy, split.unsplit, 9100)
        before = by_source(prefiller, "external_kv_transfer")
        for one in (split.prefiller, split.decoder):
            post(one, "/reset_prefix_cache", {})
        same_answers(proxy, split.unsplit, 9100)
        assert by_source(prefiller, "external_kv_transfer") > before  # the second time out of the tier
        assert eventually(lambda: used(prefiller) == 0 and used(split.decoder) == 0)

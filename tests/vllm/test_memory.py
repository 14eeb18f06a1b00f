"""The KV where the sidecar can't map it: through a staging buffer, or by its address in the engine's own process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm.servers import Ask, Server, baton, eventually, proxy_server, running, vllm_server
from tests.vllm.splits import LENGTHS, Split, by_source, nothing_held, prompt, same_answers

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("memory", ["staging", "in_process"])
def test_a_split_over_each_memory_provider(unsplit: Server, model: Path, tmp_path: Path, memory: str) -> None:
    prefiller = vllm_server("memory-prefiller", model, tmp_path, baton("kv_producer", memory=memory, lease_s=20))
    decoder = vllm_server("memory-decoder", model, tmp_path, baton("kv_consumer", memory=memory, pull_timeout_s=30))
    proxy = proxy_server([prefiller], [decoder], tmp_path)
    with running(prefiller, decoder), running(proxy):
        for server in (prefiller, decoder):
            assert f"memory={memory}" in server.log.read_text()
        same_answers(proxy, unsplit, 30_000)
        asks = [Ask(prompt(10 + 30 * n, 31_000 + n), chat=n % 2 == 1, stream=n % 3 == 0) for n in range(8)]
        with ThreadPoolExecutor(8) as pool:
            want = list(pool.map(lambda ask: ask.text(unsplit), asks))
            assert list(pool.map(lambda ask: ask.text(proxy), asks)) == want
        # Every prompt token but the last came from the prefiller.
        assert by_source(decoder, "external_kv_transfer") > 0
        assert by_source(decoder, "local_compute") <= len(LENGTHS) + len(asks)
        assert eventually(lambda: nothing_held(Split(prefiller, decoder, proxy, unsplit)))

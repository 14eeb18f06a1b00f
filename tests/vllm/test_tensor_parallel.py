"""Two ranks on each side: every rank's sidecar hands over its own heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.servers import Ask, baton, eventually, proxy_server, running, vllm_server
from tests.vllm.test_split import LENGTHS, prompt

pytestmark = pytest.mark.timeout(600)


def test_two_ranks_answer_what_they_do_unsplit(model: Path, tmp_path: Path) -> None:
    prefiller = vllm_server("prefiller-tp2", model, tmp_path, baton("kv_producer"), num_ranks=2)
    decoder = vllm_server("decoder-tp2", model, tmp_path, baton("kv_consumer"), num_ranks=2)
    proxy = proxy_server([prefiller], [decoder], tmp_path)
    with running(prefiller, decoder), running(proxy):
        for number, length in enumerate(LENGTHS):
            ask = Ask(prompt(length, 7000 + number), chat=number % 2 == 1)
            want = ask.text(prefiller)  # asked directly, it serves the whole request
            assert ask.text(proxy) == want
        assert decoder.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") > 0
        assert eventually(lambda: prefiller.metric("vllm:kv_cache_usage_perc") == 0)

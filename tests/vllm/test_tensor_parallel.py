"""Engines of two ranks and of one: every rank gets its own heads, from whichever ranks hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.servers import Ask, Server, baton, eventually, proxy_server, running, vllm_server
from tests.vllm.splits import LENGTHS, prompt

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


def test_two_ranks_and_one_hand_over_to_each_other(model: Path, tmp_path: Path) -> None:
    """In float32, where the sums of two ranks and of one differ too little to change a greedy answer."""
    two = vllm_server("two-ranks", model, tmp_path, baton("kv_both"), "--dtype", "float32", num_ranks=2)
    one = vllm_server("one-rank", model, tmp_path, baton("kv_both"), "--dtype", "float32")
    to_one, to_two = proxy_server([two], [one], tmp_path), proxy_server([one], [two], tmp_path)
    with running(two, one), running(to_one, to_two):
        for seed, prefiller, decoder, proxy in ((7100, two, one, to_one), (7200, one, two, to_two)):
            before = external_tokens(decoder)
            for number, length in enumerate(LENGTHS):
                # The decoder sees each prompt only with the KV that it is handed.
                ask = Ask(prompt(length, seed + number), chat=number % 2 == 1)
                want = ask.text(prefiller)  # asked directly, it serves the whole request
                assert ask.text(proxy) == want
            assert external_tokens(decoder) - before > sum(LENGTHS)  # a word is several tokens
            assert eventually(lambda server=prefiller: server.metric("vllm:kv_cache_usage_perc") == 0)  # type: ignore[misc]


def external_tokens(server: Server) -> float:
    return server.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")

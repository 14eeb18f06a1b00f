"""Contract `sglang` over processes: pairs that meet in a room; the prefiller answers when the decoder has the KV."""

from __future__ import annotations

import pytest

from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, HOST, Engines, Proxy, body_of, text_for

CONTRACT = "sglang"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_both_get_the_same_body_with_a_room_of_their_own(proxy: Proxy, engines: Engines, path: str) -> None:
    for number in range(4):
        fields = body_of(path, num_tokens=6, stream=bool(number % 2), odd={"kept": [1.5]})
        assert proxy.post(path, fields).text == text_for(fields)
    prefill, decode = engines.requests("prefill"), engines.requests("decode")
    by_room = {one["body"]["bootstrap_room"]: one["body"] for one in prefill}
    assert len(by_room) == 4
    for one in decode:
        body = one["body"]
        assert body == by_room[body["bootstrap_room"]]
        assert (body["max_tokens"], body["odd"], body["bootstrap_host"]) == (6, {"kept": [1.5]}, HOST)
        assert body["bootstrap_port"] in engines.prefill


def test_a_prefill_that_answers_after_the_decoder_is_read_to_its_end(proxy: Proxy, engines: Engines) -> None:
    """Its connection can be used again, and nothing counts it as aborted."""
    for number in range(6):
        fields = body_of(CHAT, stream=bool(number % 2), mock={"prefill_s": 0.02})
        assert proxy.post(CHAT, fields).text == text_for(fields)
    assert engines.count("prefill", "aborted") == 0
    assert engines.count("prefill", "finished") == 6


def test_a_list_of_prompts_is_sent_as_it_is(proxy: Proxy, engines: Engines) -> None:
    fields = {**body_of(COMPLETIONS), "prompt": ["a", "b"]}
    assert proxy.post(COMPLETIONS, fields).text == text_for(fields)
    assert engines.requests("prefill")[0]["body"]["prompt"] == ["a", "b"]

"""Contract `sglang` over processes: pairs that meet in a room; the prefiller answers when the decoder has the KV."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.proxy_blackbox.contracts import ports_flags
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


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("more", [{}, {"prompt": ["a", "b"]}])
def test_several_choices_are_given_a_room_each(
    proxy: Proxy, engines: Engines, stream: bool, more: dict[str, object]
) -> None:
    """SGLang gives all of them the one room of the request, where all but the first wait in vain."""
    fields = {**body_of(COMPLETIONS, stream=stream, n=3), **more}
    answer = proxy.post(COMPLETIONS, fields)
    assert (answer.status, answer.text) == (200, text_for(fields))
    sent = [one["body"] for one in engines.requests("decode")]
    assert len({one["bootstrap_room"] for one in sent}) == len(sent) == 3 * len(fields["prompt"] if more else "a")
    assert {one["n"] for one in sent} == {1}


def test_more_choices_than_can_be_divided_are_refused(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    """No decoder of SGLang has a prefill of its own, to which they could be left."""
    proxy = start_proxy("--contract", "sglang", *ports_flags(engines), "--max-children", "2")
    answer = proxy.post(CHAT, body_of(CHAT, n=3))
    assert (answer.status, answer.error["param"]) == (400, "n")
    assert proxy.post(CHAT, body_of(CHAT, n=2)).status == 200


def test_a_list_of_prompts_is_sent_as_it_is(proxy: Proxy, engines: Engines) -> None:
    fields = {**body_of(COMPLETIONS), "prompt": ["a", "b"]}
    assert proxy.post(COMPLETIONS, fields).text == text_for(fields)
    assert engines.requests("prefill")[0]["body"]["prompt"] == ["a", "b"]

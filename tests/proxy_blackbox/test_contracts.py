"""What holds in every contract: right answers, errors of either leg retried unseen or told, clients that leave.

After each test loads, connections and both KV ledgers are empty, and no engine was told anything its contract has not.
"""

from __future__ import annotations

import pytest

from bench.mock_answers import script_of
from tests.proxy_blackbox.contracts import CONTRACTS, begun, called_off, leave
from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, Engines, Proxy, body_of, eventually, text_for

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
ROLE = pytest.mark.parametrize("role", ["prefill", "decode"])


@pytest.fixture(scope="module", params=CONTRACTS)
def contract(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def served(proxy: Proxy, path: str, stream: bool, **more: object) -> None:
    fields = body_of(path, num_tokens=7, stream=stream, **more)
    answer = proxy.post(path, fields)
    assert (answer.status, answer.text) == (200, text_for(fields)), answer.body[:500]
    if stream:
        assert answer.events[-1] == "[DONE]"


@STREAM
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_answer_is_the_decoders_after_one_prefill(proxy: Proxy, engines: Engines, path: str, stream: bool) -> None:
    for number in range(3):
        served(proxy, path, stream, user=f"kept {number}")
    assert engines.count("prefill", "prefills") == engines.count("decode", "decodes") == 3
    assert engines.state()["kv"]["counts"]["consumed"] == 3
    assert [one["body"]["user"] for one in engines.requests("decode")].count("kept 1") == 1
    for role in ("prefill", "decode"):
        assert all(one["body"]["model"] == "mock" for one in engines.requests(role))


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@STREAM
def test_the_other_apis_go_the_same_way(proxy: Proxy, engines: Engines, contract: str, path: str, stream: bool) -> None:
    """But for layerwise, whose decoder calls under ids of /v1/responses that can't be foretold: it computes those."""
    fields: dict[str, object] = {"model": "mock", "stream": stream, "mock": {"cached_tokens": 3}}
    if path == "/v1/responses":
        fields.update(input="Say it", max_output_tokens=5)
    else:
        fields.update(messages=[{"role": "user", "content": "Say it"}], max_tokens=5)
    answer = proxy.post(path, fields)
    script, alone = script_of(fields), contract == "layerwise" and path == "/v1/responses"
    assert answer.status == 200 and all(script.token(at).encode() in answer.body for at in range(5))
    assert engines.count("prefill", "prefills") == (0 if alone else 1)
    assert engines.count("decode", "decodes") == 1
    key = b"cached_tokens" if path == "/v1/responses" else b"cache_read_input_tokens"
    assert b'"%b":%d' % (key, 0 if alone else 3) in answer.body


@pytest.mark.parametrize("kind", ["reset_mid", "close_mid"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_whose_decoder_is_lost_is_gone_on_with(proxy: Proxy, engines: Engines, path: str, kind: str) -> None:
    engines.fault("decode", kind, shared=True, after=3)
    served(proxy, path, True)
    assert engines.count("decode", "decodes") == 2


@STREAM
@pytest.mark.parametrize("answer_s", [0, 0.05], ids=["prompt", "late"])
def test_usage_says_what_the_prefiller_found_cached(proxy: Proxy, stream: bool, answer_s: float) -> None:
    """Also where both legs run at once, and the prefiller's answer comes when the client has its first token."""
    mock = {"cached_tokens": 3, "decoder_cached_tokens": 77, "interval_s": 0.02, "answer_s": answer_s}
    more = {"stream_options": {"include_usage": True}} if stream else {}
    answer = proxy.post(CHAT, body_of(CHAT, num_tokens=20, stream=stream, mock=mock, **more))
    usage = answer.events[-2]["usage"] if stream else answer.json["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_of_what_was_gone_on_with_is_the_whole_answers(proxy: Proxy, engines: Engines, path: str) -> None:
    engines.fault("decode", "reset_mid", shared=True, after=3)
    fields = body_of(
        path, num_tokens=9, stream=True, stream_options={"include_usage": True},
        mock={"cached_tokens": 3, "decoder_cached_tokens": 77, "interval_s": 0.01},
    )  # fmt: skip
    answer = proxy.post(path, fields)
    assert (answer.text, engines.count("decode", "decodes")) == (text_for(fields), 2)
    num_prompt = script_of(fields).num_prompt_tokens
    assert answer.events[-2]["usage"] == {
        "prompt_tokens": num_prompt, "completion_tokens": 9, "total_tokens": num_prompt + 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip


def test_a_request_goes_with_one_id(proxy: Proxy, engines: Engines) -> None:
    served(proxy, CHAT, False)
    ids = {one["headers"]["x-request-id"] for role in ("prefill", "decode") for one in engines.requests(role)}
    assert len(ids) == 1


def test_many_at_once_are_not_mixed_up(proxy: Proxy, engines: Engines) -> None:
    socks = [begun(proxy, CHAT, body_of(CHAT, f"number {i}", mock={"prefill_s": 0.1})) for i in range(12)]
    for i, sock in enumerate(socks):
        seen = b""
        while b"finish_reason" not in seen:
            seen += sock.recv(65536)
        assert seen.startswith(b"HTTP/1.1 200") and text_for(body_of(CHAT, f"number {i}")).encode() in seen
        sock.close()
    assert engines.count("prefill", "prefills") == engines.count("decode", "decodes") == 12


@STREAM
@ROLE
@pytest.mark.parametrize("kind", ["status", "reset_before_head", "garbage"])
def test_either_leg_fails_and_the_client_does_not_see_it(
    proxy: Proxy, engines: Engines, role: str, kind: str, stream: bool
) -> None:
    engines.fault(role, kind, shared=True)
    served(proxy, CHAT, stream)
    assert engines.count(role, "faults") == 1


@ROLE
def test_either_leg_hangs_and_another_instance_is_asked(proxy: Proxy, engines: Engines, role: str) -> None:
    engines.fault(role, "hang_before_head", shared=True)
    served(proxy, COMPLETIONS, True)


@ROLE
def test_either_leg_is_down(proxy: Proxy, engines: Engines, role: str) -> None:
    engines.stop(getattr(engines, role)[0])
    for _ in range(3):
        served(proxy, CHAT, True)


@pytest.mark.parametrize("kind", ["reset_mid", "close_mid"])
def test_a_prefill_breaks_while_it_answers(proxy: Proxy, engines: Engines, kind: str) -> None:
    engines.fault("prefill", kind, shared=True)
    served(proxy, CHAT, True)


@STREAM
@ROLE
def test_a_4xx_of_either_leg_is_the_clients(proxy: Proxy, engines: Engines, role: str, stream: bool) -> None:
    engines.fault(role, "status", status=400, shared=True, message="too long a prompt")
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream))
    assert (answer.status, answer.error["message"]) == (400, "too long a prompt")


@STREAM
@ROLE
def test_an_error_that_stays_is_told(proxy: Proxy, engines: Engines, role: str, stream: bool) -> None:
    engines.fault(role, "status", status=500, count=99)
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream))
    assert answer.status == 500 and answer.error
    eventually(proxy.wrong, "the proxy is not idle")
    assert not engines.state()["kv"]["violations"]
    engines.reset()  # mooncake: no decoder was left that could take what the prefillers hold


@ROLE
def test_all_of_a_role_are_down(proxy: Proxy, engines: Engines, role: str) -> None:
    for port in getattr(engines, role):
        engines.stop(port)
    answer = proxy.post(CHAT, body_of(CHAT))
    assert answer.status in (502, 503) and answer.error
    for port in getattr(engines, role):
        engines.start(port)
    eventually(lambda: proxy.post(CHAT, body_of(CHAT)).status != 200, "not served when they are back")


@STREAM
def test_a_client_leaves_in_prefill(proxy: Proxy, engines: Engines, stream: bool) -> None:
    sock = begun(proxy, CHAT, body_of(CHAT, stream=stream, mock={"prefill_s": 10}))
    eventually(lambda: not engines.count("prefill", "prefills"), "no prefill began")
    leave(sock)
    eventually(proxy.wrong, "the proxy is not idle")
    eventually(engines.wrong, "the engines are not idle")
    assert engines.count("decode", "decodes") == 0


@STREAM
def test_a_client_leaves_before_the_first_token(proxy: Proxy, engines: Engines, stream: bool) -> None:
    sock = begun(proxy, CHAT, body_of(CHAT, stream=stream, mock={"first_token_s": 30}))
    eventually(lambda: not engines.count("decode", "decodes"), "no decode began")
    leave(sock)
    called_off(proxy, engines, "decode")


def test_a_client_leaves_in_the_stream(proxy: Proxy, engines: Engines) -> None:
    sock = begun(proxy, CHAT, body_of(CHAT, num_tokens=1000, stream=True, mock={"interval_s": 0.02}))
    seen = b""
    while seen.count(b"data: ") < 4:
        seen += sock.recv(65536)
    leave(sock)
    called_off(proxy, engines, "decode")


def test_fifty_clients_that_leave_at_once(proxy: Proxy, engines: Engines) -> None:
    shape = {"prefill_s": 0.02, "first_token_s": 0.02, "interval_s": 0.005}
    for number in range(50):
        sock = begun(proxy, CHAT, body_of(CHAT, f"client {number}", stream=bool(number % 2), mock=shape))
        if number % 3:
            eventually(lambda n=number: engines.count("prefill", "requests") < n // 3, "no prefill began")
        leave(sock)
    served(proxy, CHAT, True)

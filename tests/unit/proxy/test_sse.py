from __future__ import annotations

import orjson
import pytest

from proxy import sse

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
SPACED_ROLE = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}'
ERROR = b'data: {"error":{"message":"no KV","type":"kv_load_error","code":503}}'


@pytest.mark.parametrize("opening", [b"", b": keep-alive\n\n", ROLE + b"\n\n", SPACED_ROLE + b"\r\n\r\n"])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_the_first_telling_event_is_found_at_its_last_byte(opening: bytes, end: bytes) -> None:
    stream = opening + TOKEN + end + b"data: more"
    telling = len(opening + TOKEN + end)
    for cut in range(len(stream) + 1):
        found = sse.first_telling_event(stream[:cut])
        assert found == (TOKEN if cut >= telling else None), cut


def test_a_role_chunk_with_text_or_an_end_says_something() -> None:
    for choice in (
        {"delta": {"role": "assistant", "content": "x"}},
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": "stop"},
        {"delta": {"role": "assistant", "content": "", "tool_calls": [1]}},
    ):
        event = b"data: " + orjson.dumps({"choices": [choice]})
        assert sse.first_telling_event(event + b"\n\n") == event


def test_the_end_of_an_empty_stream_is_telling() -> None:
    assert sse.first_telling_event(sse.DONE) == b"data: [DONE]"


def test_an_error_event_is_told_from_others() -> None:
    found = sse.error_of(ERROR)
    assert found is not None and found[0] == 503
    assert orjson.loads(found[1])["error"]["message"] == "no KV"
    assert sse.error_of(TOKEN) is None
    assert sse.error_of(b"data: [DONE]") is None
    cut = sse.error_of(b'data: {"error":')
    assert cut is not None and cut[0] == 502 and orjson.loads(cut[1])["error"]["code"] == 502
    assert sse.error_of(b'data: {"object":"error","message":"x","code":400}') is not None


def test_our_error_event_is_one_too() -> None:
    event = sse.error_event(502, "lost", "upstream_error")
    assert event.endswith(b"\n\n")
    found = sse.error_of(event.strip())
    assert found is not None and found[0] == 502

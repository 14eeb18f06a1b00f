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


NAMED = b"event: content_block_delta\ndata: {}\n\n"
OPENINGS = (
    b'event: message_start\ndata: {"type":"message_start"}\n\n',
    b"event: content_block_start\ndata: {}\n\n",
    b"event: ping\ndata: {}\n\n",
    b"event: response.created\r\ndata: {}\r\n\r\n",
    b"event: response.in_progress\ndata: {}\n\n",
)


def test_named_events_that_only_open_do_not_tell() -> None:
    for opening in OPENINGS:
        assert sse.first_telling_event(opening) is None
        assert sse.first_telling_event(opening + NAMED) == NAMED[:-2]


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"m"}}', 503),
        (b'event: error\ndata: {"type":"error","error":{"type":"invalid_request_error","message":"m"}}', 400),
        (b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"m"}}', 502),
        (b'event: error\ndata: {"type":"error","error":{"code":404,"message":"m"}}', 404),
        (b'event: response.failed\ndata: {"response":{"error":{"code":"server_error","message":"m"}}}', 502),
        (b"event: error\ndata: nonsense", 502),
    ],
)
def test_named_errors(event: bytes, status: int) -> None:
    found = sse.error_of(event)
    assert found is not None and found[0] == status
    assert sse.error_of(NAMED[:-2]) is None


@pytest.mark.parametrize("name", [b"error", b"response.failed"])
@pytest.mark.parametrize("data", [b"", b"\ndata:", b"\ndata: nonsense", b"\ndata: []"])
def test_an_error_without_words_gets_ours(name: bytes, data: bytes) -> None:
    for route in ("messages", "responses", "chat"):
        found = sse.error_of(b"event: " + name + data, route)
        assert found is not None and found[0] == 502
        told = orjson.loads(found[1])
        assert told["error"]["message"] and (told.get("type") == "error") is (route == "messages")


def test_an_error_event_is_the_apis_own() -> None:
    assert sse.error_event(502, "lost", "upstream_error", "chat").startswith(b'data: {"error"')
    for route in ("messages", "responses"):
        event = sse.error_event(502, "lost", "upstream_error", route)
        assert event.startswith(b'event: error\ndata: {"type":"error"') and event.endswith(b"}\n\n")
        assert sse.error_of(event[:-2]) is not None


@pytest.mark.parametrize("route", ["chat", "completions", "messages", "responses"])
@pytest.mark.parametrize(
    "body", [b'{"error":{"message":"no","type":"t","param":null,"code":400}}', b"<h1>no\n</h1>", b""]
)
def test_an_error_answer_as_an_event_is_one_line_of_the_apis_json(route: str, body: bytes) -> None:
    event = sse.as_event(400, body, route)
    head, _, data = event.partition(b"data: ")
    assert head == (b"event: error\n" if route in ("messages", "responses") else b"")
    assert data.endswith(b"\n\n") and data.count(b"\n") == 2
    told = orjson.loads(data)
    assert told["message" if route == "responses" else "error"]
    assert sse.error_of(event.rstrip()) is not None

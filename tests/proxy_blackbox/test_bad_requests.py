"""What cannot be served is answered in the OpenAI shape, names the field and troubles no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    Engines,
    Proxy,
    body_of,
    connected,
    raw_post,
    read_answer,
    request,
    text_for,
)

UNTROUBLED = ("prefill", "decode")


def nobody_was_asked(engines: Engines) -> bool:
    return not any(engines.count(role, "requests") for role in UNTROUBLED)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "a",}',
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe{}",
        b'{"prompt": NaN}',
        b'{"a":1}x',
        b"{" * 5000,
    ],
)
def test_malformed_json_is_400(proxy: Proxy, engines: Engines, body: bytes) -> None:
    answer = proxy.post(COMPLETIONS, body)
    assert answer.status == 400 and answer.error["type"] == "Bad Request"  # vLLM's word
    assert nobody_was_asked(engines)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"max_tokens": 3}, "prompt"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -5}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "nine"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 9.5}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "stream": "maybe"}, "stream"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
        (COMPLETIONS, {"prompt": "a", "model": 7}, "model"),
        (CHAT, {"max_tokens": 3}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_wrong_fields_are_named(proxy: Proxy, engines: Engines, path: str, fields: dict[str, Any], param: str) -> None:
    answer = proxy.post(path, fields)
    assert answer.status in (400, 422) and answer.error["param"] == param
    assert nobody_was_asked(engines)


_POST = b"POST /v1/completions HTTP/1.1\r\n"
BAD_HEADS = {
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n",
    "no such version": b"POST /v1/completions HTTP/x\r\nHost: a\r\n\r\n",
    "no host": _POST + b"Content-Length: 2\r\n\r\n{}",
    "blank before the colon": _POST + b"Host : a\r\nContent-Length: 2\r\n\r\n{}",
    "negative length": _POST + b"Host: a\r\nContent-Length: -2\r\n\r\n{}",
    "length that is no number": _POST + b"Host: a\r\nContent-Length: two\r\n\r\n{}",
    "two lengths": _POST + b"Host: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "length and chunked": _POST + b"Host: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunk size": _POST + b"Host: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "control character": _POST + b"Host: a\r\nX-A: b\x00c\r\nContent-Length: 2\r\n\r\n{}",
    "bare line feed in a value": _POST + b"Host: a\r\nX-A: b\n c\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("head", BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_heads_are_400_and_end_the_connection(proxy: Proxy, engines: Engines, head: bytes) -> None:
    with connected(proxy.port) as sock:
        sock.sendall(head)
        answer = read_answer(sock)
        assert answer.status == 400 and answer.error
        assert sock.recv(1) == b""
    assert nobody_was_asked(engines)


def test_an_unknown_transfer_coding_is_refused(proxy: Proxy, engines: Engines) -> None:
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
        assert read_answer(sock).status in (400, 501)
    assert nobody_was_asked(engines)


def test_a_head_without_end_is_431(proxy: Proxy) -> None:
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 70_000)
        assert read_answer(sock).status in (400, 431)


@pytest.mark.parametrize("how", ["declared", "chunked"])
def test_a_body_over_the_limit_is_413_and_one_at_the_limit_is_served(
    start_proxy: Callable[..., Proxy], how: str
) -> None:
    proxy = start_proxy("--max-body-bytes", "1000")
    fields = body_of(COMPLETIONS, prompt="", num_tokens=2)
    empty = len(_encoded(fields))
    for size, status in ((1000, 200), (1001, 413)):
        fields["prompt"] = "p" * (size - empty)
        body = _encoded(fields)
        assert len(body) == size
        with connected(proxy.port) as sock:
            if how == "declared":
                sock.sendall(raw_post(COMPLETIONS, body))
            else:
                head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                pieces = [body[start : start + 300] for start in range(0, size, 300)]
                sock.sendall(head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
            answer = read_answer(sock)
        assert answer.status == status, answer.body
        assert answer.error if status == 413 else answer.text == text_for(fields)


def _encoded(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def test_a_big_body_over_the_limit_gets_its_answer_while_it_is_still_sending(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--max-body-bytes", "1000")
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 200_000)
        assert read_answer(sock).status == 413


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_on_the_hot_routes_are_405(proxy: Proxy, method: str) -> None:
    answer = request(proxy.port, method, COMPLETIONS)
    assert answer.status == 405 and "POST" in answer.headers["allow"]


def test_unknown_paths_are_404(proxy: Proxy) -> None:
    for answer in (proxy.get("/nothing"), proxy.post("/v1/completions/", {}), proxy.post("/v1/embeddings", {})):
        assert answer.status == 404 and answer.error


def test_a_crafted_request_id_does_not_split_the_head(proxy: Proxy, engines: Engines) -> None:
    with connected(proxy.port) as sock:
        body = _encoded(body_of(COMPLETIONS))
        sock.sendall(raw_post(COMPLETIONS, body, "X-Request-Id: a b\tc", "X-Request-Id: " + "r" * 3000))
        assert read_answer(sock).status in (200, 400)
    for leg in UNTROUBLED:
        for seen in engines.requests(leg):
            assert len(seen["headers"]["x-request-id"]) <= 256 and " " not in seen["headers"]["x-request-id"]


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engines_4xx_is_passed_on_and_not_retried(
    proxy: Proxy, engines: Engines, leg: str, status: int, stream: bool
) -> None:
    engines.fault(leg, "status", status=status, message="it is your fault")
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream))
    assert answer.status == status
    assert answer.error["message"] == "it is your fault"
    assert engines.count(leg, "faults") == 1

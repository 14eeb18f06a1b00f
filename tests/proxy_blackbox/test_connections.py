"""HTTP/1.1 as clients speak it: keep-alive, pipelining, pieces, 100-continue, slow readers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
    text_for,
)

MIB = 1 << 20


def test_a_connection_serves_many_requests_of_all_kinds(proxy: Proxy) -> None:
    with connected(proxy.port) as sock:
        for number in range(6):
            path = (CHAT, COMPLETIONS)[number % 2]
            fields = body_of(path, f"number {number}", stream=number % 3 == 0)
            sock.sendall(raw_post(path, json.dumps(fields).encode()))
            assert read_answer(sock).text == text_for(fields)


def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    asked = [body_of(COMPLETIONS, f"pipelined {n}", mock={"first_token_s": 0.05 * (4 - n)}) for n in range(4)]
    with connected(proxy.port) as sock:
        sock.sendall(b"".join(raw_post(COMPLETIONS, json.dumps(fields).encode()) for fields in asked))
        reader = sock.makefile("rb")
        for fields in asked:
            assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := reader.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert json.loads(reader.read(length))["choices"][0]["text"] == text_for(fields)
        reader.close()


@pytest.mark.parametrize("size", [1, 7])
def test_a_request_in_small_pieces(proxy: Proxy, size: int) -> None:
    fields = body_of(COMPLETIONS, "pieces ☃")
    raw = raw_post(COMPLETIONS, json.dumps(fields).encode())
    with connected(proxy.port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(raw), size):
            sock.sendall(raw[start : start + size])
        assert read_answer(sock).text == text_for(fields)


def test_a_chunked_request(proxy: Proxy) -> None:
    fields = body_of(CHAT, "chunked")
    body = json.dumps(fields).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body)))
    with connected(proxy.port) as sock:
        sock.sendall(head + chunks + b"0\r\nTrailer: x\r\n\r\n")
        assert read_answer(sock).text == text_for(fields)
        sock.sendall(raw_post(CHAT, body))
        assert read_answer(sock).text == text_for(fields)


def test_expect_100_continue(proxy: Proxy) -> None:
    fields = body_of(COMPLETIONS, "wait for it")
    body = json.dumps(fields).encode()
    raw = raw_post(COMPLETIONS, body, "Expect: 100-continue")
    with connected(proxy.port, timeout=3) as sock:
        sock.sendall(raw[: -len(body)])
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_answer(sock).text == text_for(fields)


def test_expect_100_continue_with_a_body_too_large_is_refused_before_it_is_sent(
    start_proxy: Callable[..., Proxy],
) -> None:
    proxy = start_proxy("--max-body-bytes", "1000")
    with connected(proxy.port, timeout=3) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5000\r\n\r\n"
        )
        assert read_answer(sock).status == 413


def test_connection_close_is_honoured(proxy: Proxy) -> None:
    for stream in (False, True):
        fields = body_of(CHAT, stream=stream)
        with connected(proxy.port) as sock:
            sock.sendall(raw_post(CHAT, json.dumps(fields).encode(), "Connection: close"))
            assert read_answer(sock).text == text_for(fields)
            assert sock.recv(1) == b""


def test_http_1_0_gets_no_chunks(proxy: Proxy) -> None:
    fields = body_of(CHAT, stream=True)
    body = json.dumps(fields).encode()
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        seen = b""
        while more := sock.recv(65536):
            seen += more
    head, _, rest = seen.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert rest.startswith(b"data: ") and rest.endswith(b"data: [DONE]\n\n")


def test_the_other_routes_work_on_a_connection_of_the_hot_ones(proxy: Proxy) -> None:
    fields = body_of(CHAT)
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        assert read_answer(sock).text == text_for(fields)
        sock.sendall(b"GET /healthcheck HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_answer(sock).json["status"] == "ok"


def test_a_slow_reader_slows_its_engine_and_not_the_proxys_memory(proxy: Proxy, engines: Engines) -> None:
    fields = body_of(CHAT, stream=True, mock={"num_tokens": 99_999})  # about 20 MB
    proxy.post(CHAT, body_of(CHAT))
    before = proxy.rss_bytes()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", proxy.port))
        sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        time.sleep(1.5)
        assert proxy.rss_bytes() - before < 8 * MIB
        assert any(one["num_running"] for one in engines.state()["instances"]), "the engine was not slowed down"
        assert proxy.post(CHAT, body_of(CHAT)).status == 200, "others are served meanwhile"
        answer = read_answer(sock)
    assert answer.text == text_for(fields), "and then all of it arrives"


def test_many_streams_at_once(proxy: Proxy) -> None:
    def one(number: int) -> bool:
        fields = body_of(CHAT, f"stream {number}", num_tokens=20, stream=True, mock={"interval_s": 0.01})
        return proxy.post(CHAT, fields).text == text_for(fields)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(one, range(128)))


def test_idle_connections_are_closed(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--client-keepalive-s", "0.3", "--request-read-timeout-s", "0.3")
    with connected(proxy.port) as sock:
        assert sock.recv(1) == b""
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert read_answer(sock).status == 408


def test_requests_pipelined_behind_a_control_route_leave_the_first_answer_whole(proxy: Proxy) -> None:
    """The control routes answer one request a connection and say so; the client sends the other one again."""
    with connected(proxy.port) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = _to_end(sock)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000,
    ],
    ids=["long-target", "many-headers"],
)
def test_a_control_request_that_cannot_be_parsed_is_an_openai_error(proxy: Proxy, request_head: bytes) -> None:
    with connected(proxy.port) as sock:
        sock.sendall(request_head + b"\r\n")
        answer = _to_end(sock)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"400", b"431")
    assert json.loads(body)["error"]["message"]


def test_a_request_without_a_body_that_wants_the_connection_closed_is_closed(proxy: Proxy) -> None:
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = _to_end(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer.lower()


def _to_end(sock: socket.socket) -> bytes:
    """What comes until the other side closes; a reset after the answer is an end, too."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received

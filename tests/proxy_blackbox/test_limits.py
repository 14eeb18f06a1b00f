"""What a client can take of the proxy: time, connections, memory. Who keeps to the limits notices nothing of it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import pytest

from tests.proxy_blackbox.harness import (
    COMPLETIONS,
    HOST,
    Answer,
    Engines,
    Proxy,
    body_of,
    connected,
    eventually,
    raw_post,
    read_answer,
    request,
    text_for,
)

Start = Callable[..., Proxy]
FIELDS = body_of(COMPLETIONS, num_tokens=2)
BODY = json.dumps(FIELDS).encode()


@contextmanager
def idle(port: int, num: int) -> Iterator[list[socket.socket]]:
    """So many connections that say nothing."""
    with ExitStack() as stack:
        yield [stack.enter_context(connected(port)) for _ in range(num)]


def is_served(port: int) -> bool:
    answer = request(port, "POST", COMPLETIONS, FIELDS)
    return answer.status == 200 and answer.text == text_for(FIELDS)


def dripped(sock: socket.socket, raw: bytes) -> Answer:
    """The answer to a request of which a byte is sent every 50 ms, for as long as the proxy takes it."""
    sock.setblocking(False)
    for i in range(len(raw)):
        with contextlib.suppress(BlockingIOError):
            if sock.recv(1, socket.MSG_PEEK):
                break
        sock.send(raw[i : i + 1])
        time.sleep(0.05)
    sock.settimeout(10)
    return read_answer(sock)


@pytest.mark.parametrize(
    "begin", [b"POST /v1/completions HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\n", b"\r\nGET / HTTP/1.1\r\n"]
)
def test_a_head_that_drips_is_408(start_proxy: Start, begin: bytes) -> None:
    proxy = start_proxy("--header-read-timeout-s", "0.5", "--request-read-timeout-s", "30")
    with idle(proxy.port, 10) as others, connected(proxy.port) as sock:
        for one in others:
            one.sendall(begin)
        began = time.monotonic()
        assert dripped(sock, begin + b"X-A: " + b"a" * 200).status == 408
        assert time.monotonic() - began < 10
        assert is_served(proxy.port)
        for one in others:
            assert read_answer(one).status == 408 and one.recv(1) == b""


def test_empty_lines_do_not_keep_a_connection(start_proxy: Start) -> None:
    proxy = start_proxy("--client-keepalive-s", "0.5")
    with connected(proxy.port) as sock, contextlib.suppress(ConnectionError):
        for _ in range(200):
            sock.sendall(b"\r\n")
            sock.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                assert sock.recv(1) == b""
                return
        raise AssertionError("still open")


@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", [b"/v1/completions", b"/instances/add", b"/v1/embeddings"])
def test_a_body_that_stops_is_408(start_proxy: Start, path: bytes, framing: bytes) -> None:
    proxy = start_proxy("--request-read-timeout-s", "0.5")
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n%b\r\n\r\n" % (path, framing)
    with connected(proxy.port) as sock:
        sock.sendall(head + (b"4\r\n{ \r\n" if b"chunked" in framing else b"{ "))
        answer = read_answer(sock)
        assert answer.status == 408 and answer.error
        assert sock.recv(1) == b""
    assert is_served(proxy.port)


@pytest.mark.parametrize("path", [COMPLETIONS, "/instances/add", "/v1/embeddings", "/health"])
def test_a_length_over_the_limit_is_413_on_every_route(start_proxy: Start, path: str) -> None:
    proxy = start_proxy("--max-body-bytes", "1000")
    with connected(proxy.port) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n" % path.encode())
        assert read_answer(sock).status == 413
    with connected(proxy.port) as sock:
        head = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode()
        sock.sendall(head + b"3e9\r\n" + b" " * 1001 + b"\r\n")
        assert read_answer(sock).status in (413, 405)  # /health is not posted to, whatever its body is


def test_header_fields_at_the_limit_and_past_it(start_proxy: Start) -> None:
    proxy = start_proxy("--max-header-fields", "10")
    for num, status in ((8, 200), (9, 431)):
        with connected(proxy.port) as sock:
            sock.sendall(raw_post(COMPLETIONS, BODY, *[f"X-{i}: a" for i in range(num)]))
            assert read_answer(sock).status == status


def test_more_connections_than_the_limit(start_proxy: Start) -> None:
    proxy = start_proxy("--max-connections", "20", "--client-keepalive-s", "60")
    with ExitStack() as stack:
        stream = stack.enter_context(connected(proxy.port))
        fields = body_of(COMPLETIONS, num_tokens=20, stream=True, mock={"interval_s": 0.05})
        stream.sendall(raw_post(COMPLETIONS, json.dumps(fields).encode()))
        first = stack.enter_context(idle(proxy.port, 19))
        eventually(lambda: request(proxy.port, "POST", COMPLETIONS, FIELDS).status != 503, "not full")
        refused = request(proxy.port, "POST", COMPLETIONS, FIELDS)
        assert refused.status == 503 and refused.error and int(refused.headers["retry-after"]) >= 1
        assert request(proxy.port, "GET", "/instances").status == 503
        stack.enter_context(idle(proxy.port, 200))  # a flood
        for path in ("/health", "/metrics", "/healthcheck"):
            assert request(proxy.port, "GET", path).status == 200
        first[0].sendall(raw_post(COMPLETIONS, BODY))  # who is in goes on
        assert read_answer(first[0]).text == text_for(FIELDS)
        assert read_answer(stream).text == text_for(fields)
    eventually(lambda: not is_served(proxy.port), "still full")


def test_a_body_in_tiny_chunks_takes_no_more_room_than_another(start_proxy: Start) -> None:
    proxy = start_proxy()
    assert is_served(proxy.port)
    before = proxy.rss_bytes()
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            sock.sendall(b"2\r\n  \r\n" * 50_000)
        for _ in range(5):  # what was sent last is read by now
            assert is_served(proxy.port)
        grown = proxy.rss_bytes() - before
        assert grown < 20 << 20, f"{grown >> 20} MiB for 2 MB"
        sock.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert read_answer(sock).text == text_for(FIELDS)


def test_clients_that_do_not_read_do_not_fill_the_proxy(start_proxy: Start, engines: Engines) -> None:
    """30 MB are on their way to each of eight; what the proxy holds of it is its limit, not theirs."""
    proxy = start_proxy("--max-continuation-bytes", "0")
    assert is_served(proxy.port)
    fields = body_of(COMPLETIONS, num_tokens=150_000, stream=True)
    before = proxy.rss_bytes()
    with ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sock.connect((HOST, proxy.port))
            sock.sendall(raw_post(COMPLETIONS, json.dumps(fields).encode()))
        steady, last = 0, -1
        deadline = time.monotonic() + 30
        while steady < 10 and time.monotonic() < deadline:  # nothing moves any more
            now = proxy.rss_bytes()
            steady, last = (steady + 1 if abs(now - last) < 100_000 else 0), now
            time.sleep(0.1)
        assert steady == 10
        grown = proxy.rss_bytes() - before
        assert grown < 20 << 20, f"{grown >> 20} MiB"
        assert is_served(proxy.port)


def test_a_client_that_takes_nothing_for_long_is_given_up(start_proxy: Start, engines: Engines) -> None:
    proxy = start_proxy("--client-write-timeout-s", "0.5")
    fields = body_of(COMPLETIONS, num_tokens=150_000, stream=True)
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(COMPLETIONS, json.dumps(fields).encode()))
        eventually(lambda: not engines.count("decode", "requests"), "not begun")
        eventually(proxy.wrong, "its load is still there", 30)
        here = sock.getsockname()
        process = psutil.Process(proxy.process.popen.pid)
        eventually(lambda: [one for one in process.net_connections() if one.raddr == here], "still open", 30)

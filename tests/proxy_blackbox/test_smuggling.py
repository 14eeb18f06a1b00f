"""The corpus of requests that readers disagree about: refused on every kind of route alike, and never passed on."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    HOST,
    PROXY,
    Engines,
    Proxy,
    body_of,
    connected,
    raw_post,
    read_answer,
    text_for,
)
from tests.proxy_blackbox.origin import Asked, answer, origin
from tests.proxy_blackbox.smuggling_cases import BODIES, HEADS, filled

BODY = json.dumps(body_of(COMPLETIONS, num_tokens=2)).encode()
ROUTES = {
    "hot": b"POST /v1/completions",
    "chat": b"POST /v1/chat/completions",
    "admin": b"POST /instances/add",
    "health": b"GET /health",
    "passed on": b"POST /v1/embeddings",
}


def say(port: int, raw: bytes) -> tuple[int, bytes]:
    """The status of the first answer, and everything that came, until the proxy closed the connection."""
    with connected(port) as sock:
        came = b""
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            sock.sendall(raw)
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(65536):
                came += data
    return int(came[9:12] or 0), came


def num_answers(came: bytes) -> int:
    return len(re.findall(rb"HTTP/1\.1 [0-9]{3} ", came))


def asked(engines: Engines) -> int:
    return sum(engines.count(role, "requests") for role in ("prefill", "decode"))


@pytest.mark.parametrize("route", ROUTES)
def test_heads(proxy: Proxy, engines: Engines, route: str) -> None:
    wrong = {}
    for name, (case, statuses) in HEADS.items():
        status, came = say(proxy.port, filled(case, ROUTES[route], BODY))
        if status not in statuses or num_answers(came) != 1 or b"onnection: close" not in came:
            wrong[name] = came[:300]
    assert not wrong
    assert not asked(engines)


@pytest.mark.parametrize("route", ["hot", "chat", "admin", "passed on"])
def test_chunked_bodies(proxy: Proxy, engines: Engines, route: str) -> None:
    wrong = {}
    for name, (case, statuses) in BODIES.items():
        status, came = say(proxy.port, filled(case, ROUTES[route], BODY))
        if status not in statuses or num_answers(came) != 1 or b"onnection: close" not in came:
            wrong[name] = came[:300]
    assert not wrong
    assert not asked(engines)


def test_what_is_allowed_is_served_and_framed_anew(proxy: Proxy, engines: Engines) -> None:
    """Chunk extensions and trailers are dropped, and so is every field that only concerns this connection."""
    lines = b"Connection: keep-alive, X-Named\r\nX-Named: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nUpgrade: h2c\r\n"
    chunks = b"5;a=b\r\n%b\r\n%x;\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:])
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + lines + b"X-Kept: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(proxy.port) as sock:
        sock.sendall(head + chunks)
        assert read_answer(sock).text == text_for(json.loads(BODY))
    for role in ("prefill", "decode"):
        (seen,) = engines.requests(role)
        headers = seen["headers"]
        assert headers["x-kept"] == "2" and headers["content-length"].isdigit() and headers["host"] != "a"
        assert not headers.keys() & {"x-named", "keep-alive", "te", "upgrade", "x-trailer", "transfer-encoding"}
        assert "connection" not in headers


def test_what_is_passed_on_is_framed_anew(start_proxy: Callable[..., Proxy]) -> None:
    seen: list[tuple[Any, bytes]] = []

    def serve(asked: Asked) -> None:
        body = asked.until(b"}")
        seen.append((asked.headers, body))
        asked.sock.sendall(answer(200, b"{}"))

    with origin(serve) as port:
        proxy = start_proxy(*_before(port))
        raw = (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: X-Named\r\n"
            b"X-Named: 1\r\nX_Kv_Rank: 3\r\nX-Data-Parallel-Rank: 3\r\nX-Kept: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'6;ext\r\n{"a": \r\n2\r\n1}\r\n0\r\nX-Trailer: 1\r\n\r\nGET /instances HTTP/1.1\r\nHost: a\r\n\r\n'
        )
        status, came = say(proxy.port, raw)
        assert status == 200 and num_answers(came) == 1
    ((headers, body),) = seen
    names = [name.lower() for name, _ in headers]
    assert body == b'{"a": 1}' and "x-kept" in names
    assert not {"x-named", "x_kv_rank", "x-data-parallel-rank", "x-trailer", "transfer-encoding"} & set(names)
    assert names.count("content-length") == 1 and names.count("host") == 1 and names.count("x-request-id") == 1


def test_a_body_that_goes_wrong_half_way_ends_the_passed_request(start_proxy: Callable[..., Proxy]) -> None:
    """What an instance was sent so far is not ended as if it were whole."""
    ends: list[bytes] = []

    def serve(asked: Asked) -> None:
        came = asked.rest
        while data := asked.sock.recv(1 << 20):
            came += data
        ends.append(came[-7:])

    with origin(serve) as port:
        proxy = start_proxy(*_before(port))
        head = b"POST /v1/audio HTTP/1.1\r\nHost: a\r\nContent-Type: audio/wav\r\nTransfer-Encoding: chunked\r\n\r\n"
        with connected(proxy.port) as sock:
            sock.sendall(head + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 40)
            sock.sendall(b"zz\r\n")
            assert read_answer(sock).status == 400
    assert ends == [] or not ends[0].endswith(b"0\r\n\r\n")


RESPONSES = {
    "length and coding": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length with a sign": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}",
    "a coding before chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunked not last": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a bad chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    "a folded field": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\n{}",
    "a blank before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}",
    "a NUL": b"HTTP/1.1 200 OK\r\nA: \x00\r\nContent-Length: 2\r\n\r\n{}",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n{}",
    "two answers": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, "/v1/embeddings"])
@pytest.mark.parametrize("raw", RESPONSES.values(), ids=RESPONSES)
def test_an_answer_that_two_readers_could_end_differently_is_not_passed_on(
    shared_origin: tuple[Proxy, list[bytes]], route: str, raw: bytes
) -> None:
    proxy, script = shared_origin
    script[:] = [raw]
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(route, json.dumps(body_of(CHAT if route == CHAT else COMPLETIONS)).encode()))
        found = read_answer(sock)
    harmless = route == "/v1/embeddings" and raw in map(RESPONSES.get, ("bare line feeds", "a folded field"))
    if harmless or raw is RESPONSES["two answers"]:  # read to its first end, and framed anew
        assert found.status == 502 or (found.body == b"{}" and "\n" not in str(found.headers)), found
    else:
        assert found.status in (502, 503), found


@pytest.fixture(scope="module")
def shared_origin() -> Any:
    """A proxy before one instance of both roles, which answers what the list says."""
    script: list[bytes] = []

    def serve(asked: Asked) -> None:
        asked.sock.sendall(script[0])

    with origin(serve) as port:
        proxy = Proxy.__new__(Proxy)
        proxy.num_read = 0
        flags = ["--max-retries", "1", "--health-max-request-failures", "100000"]
        proxy.start([PROXY, "--host", HOST, "--port", "0", *_before(port), *flags])
        yield proxy, script
        log = proxy.process.output
        proxy.stop()
        assert "Traceback" not in log, log[-3000:]


def _before(port: int) -> list[str]:
    """The flags of a proxy before one instance of both roles."""
    ports = ["--prefiller-ports", str(port), "--decoder-ports", str(port)]
    return ["--prefiller-hosts", HOST, "--decoder-hosts", HOST, *ports, "--contract", "pull"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_http_1_0_is_served_and_closed(proxy: Proxy, version: str) -> None:
    with socket.create_connection((HOST, proxy.port), timeout=10) as sock:
        raw = raw_post(COMPLETIONS, BODY).replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1)
        if version == "1.0":
            raw = raw.replace(b"Host: test\r\n", b"", 1)
        sock.sendall(raw)
        found = read_answer(sock)
        assert found.text == text_for(json.loads(BODY))
        if version == "1.0":
            assert sock.recv(1) == b""

"""The routes that are the instances': passed on as they are, to one that has them; and those that mean all of them."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable

import pytest

from tests.proxy_blackbox.admin import at, becomes, change
from tests.proxy_blackbox.harness import (
    HOST,
    Answer,
    Engines,
    Proxy,
    connected,
    eventually,
    read_answer,
    request,
)
from tests.proxy_blackbox.origin import Asked, answer, origin

StartProxy = Callable[..., Proxy]


@pytest.fixture
def start_before(start_proxy: StartProxy) -> Callable[..., Proxy]:
    """A proxy with one decoder, an origin of the test's own, and no other instance that could be asked."""

    def start(port: int, *flags: str) -> Proxy:
        return start_proxy(
            "--decoder-hosts", HOST, "--decoder-ports", str(port), "--prefiller-hosts", HOST, "--prefiller-ports",
            str(port), "--upstream-keepalive-s", "0.1", "--contract", "pull", *flags,
        )  # fmt: skip

    return start


def test_a_route_is_served_by_an_instance_and_nothing_of_it_is_lost(proxy: Proxy, engines: Engines) -> None:
    body = b'{"prompt": "Say \xe2\x98\x83", "x": [1, 2.50]}'
    sent = request(proxy.port, "POST", "/tokenize?a=1&b=%2F", body, X_Mine="yes", Authorization="Bearer k").json
    assert (sent["method"], sent["target"]) == ("POST", "/tokenize?a=1&b=%2F")
    assert sent["body"].encode("latin-1") == body
    assert (sent["headers"]["x-mine"], sent["headers"]["authorization"]) == ("yes", "Bearer k")
    assert sent["headers"]["host"] == at(sent["port"])
    assert request(proxy.port, "POST", "/detokenize", b"{}").status == 200
    assert engines.state()["kv"]["violations"] == []


def test_instances_take_turns(start_proxy: StartProxy) -> None:
    """A proxy of its own: one that failed at requests of other tests stays out of turn until it is tried again."""
    proxy = start_proxy()
    ports = {request(proxy.port, "POST", "/tokenize", b"{}").json["port"] for _ in range(12)}
    assert len(ports) == 4


def test_one_that_lacks_the_route_is_remembered_and_the_other_role_is_asked(
    start_proxy: StartProxy, engines: Engines
) -> None:
    proxy = start_proxy()
    for port, status in zip(engines.decode, (404, 405), strict=True):
        engines.answer(port, "/score", status)
    for _ in range(6):
        assert request(proxy.port, "POST", "/score", b"{}").json["role"] == "prefill"
    assert engines.count("decode", "/score") <= 2, "each is asked once at most"


def test_a_route_that_all_lack_is_404_and_they_are_not_asked_again(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy()
    for _ in range(3):
        answered = request(proxy.port, "POST", "/v1/audio/speech", b"{}")
        assert answered.status == 404 and "/v1/audio/speech" in answered.error["message"]
    assert engines.count("prefill", "/v1/audio/speech") + engines.count("decode", "/v1/audio/speech") == 4


def test_a_model_that_is_not_there_is_the_engines_own_404(proxy: Proxy) -> None:
    assert proxy.get("/v1/models/mock").json["id"] == "mock"
    answered = proxy.get("/v1/models/nobody")
    assert answered.status == 404 and "`nobody`" in answered.error["message"]
    assert answered.error["type"] == "NotFoundError"


def test_an_instance_that_cannot_be_reached_is_passed_over(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--health-interval-s", "60")
    for port in (*engines.prefill, engines.decode[0]):
        engines.stop(port)
    for _ in range(4):
        assert request(proxy.port, "POST", "/tokenize", b"{}").json["port"] == engines.decode[1]
    engines.stop(engines.decode[1])
    answered = request(proxy.port, "POST", "/tokenize", b"{}")
    assert answered.status == 502 and "/tokenize" in answered.error["message"]


def test_an_engines_error_is_passed_on(proxy: Proxy, engines: Engines) -> None:
    for port in (*engines.prefill, *engines.decode):
        engines.answer(port, "/score", 422)
    answered = request(proxy.port, "POST", "/score", b"{}")
    assert answered.status == 422 and answered.error["message"] == "as told" and answered.headers["x-mock"] == "json"


def test_version_and_ping(proxy: Proxy) -> None:
    told = proxy.get("/version").json
    assert told["version"] == "mock" and told["proxy_version"]
    assert proxy.get("/ping").status == request(proxy.port, "POST", "/ping").status == 200


@pytest.mark.parametrize("body", [b'{"kv_transfer_params": {}}', b'{"a": [{"kv_transfer\\u005fparams": {"x": 1}}]}'])
def test_a_clients_own_kv_transfer_params_reach_no_engine(proxy: Proxy, engines: Engines, body: bytes) -> None:
    for path in ("/tokenize", "/inference/v1/generate"):
        answered = request(proxy.port, "POST", path, body)
        assert answered.status == 400 and answered.error["param"] == "kv_transfer_params"
    assert engines.count("prefill", "/tokenize") + engines.count("decode", "/tokenize") == 0


def test_a_body_over_the_limit_is_413(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--max-body-bytes", "2000000")
    assert request(proxy.port, "POST", "/tokenize", b" " * 2_000_001).status == 413
    assert request(proxy.port, "POST", "/tokenize", b'"' + b"a" * 1_999_998 + b'"').status == 200


def test_a_body_that_does_not_come_is_408(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--request-read-timeout-s", "0.3")
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert read_answer(sock).status == 408


def test_both_directions_stream(start_before: Callable[..., Proxy]) -> None:
    """The answer begins, and arrives, while the upload goes on: neither is gathered."""
    went_on = threading.Event()

    def serve(asked: Asked) -> None:
        got = len(asked.receive())
        while got < 1_500_000:
            got += len(asked.receive())
        asked.sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Odd: 1\r\n\r\n3\r\none\r\n")
        assert went_on.wait(10)
        asked.until(b"END\r\n0\r\n\r\n")
        asked.sock.sendall(b"3\r\ntwo\r\n0\r\n\r\n")

    with origin(serve) as port:
        proxy = start_before(port)
        with connected(proxy.port) as sock:
            sock.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            for _ in range(24):
                sock.sendall(b"10000\r\n" + b"u" * 65536 + b"\r\n")
            got = b""
            while b"one" not in got:
                got += sock.recv(65536)
            assert got.startswith(b"HTTP/1.1 200") and b"X-Odd: 1" in got and b"two" not in got
            went_on.set()
            sock.sendall(b"3\r\nEND\r\n0\r\n\r\n")
            while not got.endswith(b"0\r\n\r\n"):
                more = sock.recv(65536)
                assert more, got
                got += more
            assert b"two" in got
        eventually(proxy.wrong, "the proxy is not idle")


def test_headers_and_bytes_pass_untouched_but_for_hop_by_hop(start_before: Callable[..., Proxy]) -> None:
    seen: list[Asked] = []
    packed = b"\x1f\x8b these bytes are nobody's to unpack"

    def serve(asked: Asked) -> None:
        seen.append(asked)
        asked.sock.sendall(
            answer(
                203, packed, "Content-Encoding: gzip", "Content-Type: x/y", "Set-Cookie: a=1", "Set-Cookie: b=2",
                "Connection: X-Hop", "X-Hop: 1", "Keep-Alive: timeout=5",
            )
        )  # fmt: skip

    with origin(serve) as port:
        proxy = start_before(port)
        with connected(proxy.port) as sock:
            sock.sendall(
                b"PATCH /odd%20path/?q=%7B%7D&q HTTP/1.1\r\nHost: public.example\r\nX-A: 1\r\nX-A: 2\r\nCookie: c=d\r\n"
                b"Accept-Encoding: br\r\nConnection: keep-alive, X-Gone\r\nX-Gone: 1\r\nTE: trailers\r\n"
                b"Content-Length: 0\r\n\r\n"
            )
            got = read_answer(sock)
        (asked,) = seen
        assert (asked.method, asked.target) == ("PATCH", "/odd%20path/?q=%7B%7D&q")
        names = [name.lower() for name, _ in asked.headers]
        assert [value for name, value in asked.headers if name == "X-A"] == ["1", "2"]
        assert (asked.header("cookie"), asked.header("accept-encoding")) == ("c=d", "br")
        assert asked.header("host") == at(port)
        assert not {"x-gone", "te", "user-agent", "accept"} & set(names)
        assert (got.status, got.body) == (203, packed)
        assert (got.headers["content-encoding"], got.headers["content-type"]) == ("gzip", "x/y")
        assert "x-hop" not in got.headers and "keep-alive" not in got.headers


def test_a_redirect_to_itself_leads_to_the_proxy(start_before: Callable[..., Proxy]) -> None:
    def serve(asked: Asked) -> None:
        asked.sock.sendall(answer(307, b"", f"Location: http://{asked.header('host')}/v1/score"))

    with origin(serve) as port:
        answered = start_before(port).get("/v1/score/")
    assert (answered.status, answered.headers["location"]) == (307, "/v1/score")


def test_an_answer_that_breaks_off_is_not_ended_as_if_it_were_whole(start_before: Callable[..., Proxy]) -> None:
    def serve(asked: Asked) -> None:
        asked.sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")

    with origin(serve) as port:
        proxy = start_before(port)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            proxy.get("/v1/files/1/content")
        eventually(proxy.wrong, "the proxy is not idle")


def test_a_client_that_leaves_ends_it_at_the_instance(start_before: Callable[..., Proxy]) -> None:
    gone = threading.Event()

    def serve(asked: Asked) -> None:
        asked.sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        try:
            while asked.sock.recv(100):
                pass
        except OSError:
            pass
        gone.set()

    with origin(serve) as port:
        proxy = start_before(port)
        with connected(proxy.port) as sock:
            sock.sendall(b"GET /v1/files/1/content HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" in sock.recv(1000)
            assert proxy.get("/healthcheck").json["request_num"] == 1
        assert gone.wait(5)
        eventually(proxy.wrong, "the proxy is not idle")


def test_a_passed_request_counts_as_load_and_is_drained(start_before: Callable[..., Proxy]) -> None:
    began, may_end = threading.Event(), threading.Event()

    def serve(asked: Asked) -> None:
        began.set()
        assert may_end.wait(10)
        asked.sock.sendall(answer(200, b"whole"))

    with origin(serve) as port:
        proxy = start_before(port)
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(proxy.get("/slow")))
        thread.start()
        assert began.wait(5)
        for role in ("prefill", "decode"):
            change(proxy, "remove", type=role, instances=at(port))
        states = [one["state"] for one in proxy.get("/instances").json["instances"]]
        assert states == ["draining"]
        proxy.process.popen.terminate()
        eventually(lambda: "event=draining" not in proxy.process.output, "no drain")
        may_end.set()
        thread.join(10)
        assert answers[0].body == b"whole"
        assert proxy.process.popen.wait(10) == 0 and "drained=True" in proxy.process.output


# --- those that mean all


@pytest.mark.parametrize("path", ["/reset_prefix_cache", "/start_profile", "/stop_profile"])
def test_a_fan_out_reaches_every_instance_and_names_who_failed(
    start_proxy: StartProxy, engines: Engines, path: str
) -> None:
    proxy = start_proxy()
    everybody = sorted(map(at, (*engines.prefill, *engines.decode)))
    answered = request(proxy.port, "POST", f"{path}?x=1", b"")
    assert answered.status == 200 and answered.json["failed"] == []
    assert sorted(answered.json["succeeded"]) == everybody
    assert engines.count("prefill", path) == engines.count("decode", path) == 2
    ill, dead = engines.prefill[0], engines.decode[1]
    engines.answer(ill, path, 501)
    engines.stop(dead)
    answered = request(proxy.port, "POST", path, b"")
    assert answered.status == 500
    assert sorted(answered.json["failed"]) == sorted(f"http://{at(port)}{path}" for port in (ill, dead))
    assert answered.json["reasons"][f"http://{at(ill)}{path}"] == "status 501"
    assert len(answered.json["succeeded"]) == 2


def test_a_fan_out_leaves_out_whoever_is_leaving(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy()
    change(proxy, "remove", type="decode", instances=at(engines.decode[0]))
    becomes(proxy, "decode", engines.decode[0], None)
    assert len(request(proxy.port, "POST", "/start_profile", b"").json["succeeded"]) == 3


def test_a_fan_out_is_concurrent_and_passes_key_and_body(start_proxy: StartProxy) -> None:
    """All are asked before any has answered; the client's key goes with it (the example proxy sends none)."""
    together = threading.Barrier(2)
    seen: list[tuple[str | None, bytes]] = []

    def serve(asked: Asked) -> None:
        seen.append((asked.header("authorization"), asked.receive()))
        together.wait(10)
        asked.sock.sendall(answer(200, b""))

    with origin(serve) as one, origin(serve) as other:
        proxy = start_proxy(
            "--prefiller-hosts", HOST, "--prefiller-ports", str(one), "--decoder-hosts", HOST, "--decoder-ports",
            str(other), "--upstream-keepalive-s", "0.1", "--contract", "pull",
        )  # fmt: skip
        told = request(proxy.port, "POST", "/start_profile", b'{"n": 1}', Authorization="Bearer k")
    assert told.status == 200 and seen == [("Bearer k", b'{"n": 1}')] * 2

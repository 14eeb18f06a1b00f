"""TLS to clients and to instances: served and verified by default, changed without a restart, refused in one line."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    HOST,
    PROXY,
    Answer,
    Engines,
    Process,
    Proxy,
    body_of,
    eventually,
    request,
    text_for,
)
from tests.proxy_blackbox.tls import HAS_OPENSSL, Authority, behind_tls

pytestmark = pytest.mark.skipif(
    not HAS_OPENSSL, reason="the openssl command is not installed (apt-get install openssl)"
)
NAMES = "IP:127.0.0.1,DNS:localhost"
FIELDS = body_of(COMPLETIONS, num_tokens=3)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


class TlsProxy(Proxy):
    """A proxy that serves HTTPS; it is asked as a client that checks its certificate would."""

    ca = ""

    def wait_until_serving(self) -> None:
        eventually(lambda: self.ask("GET", "/healthcheck").status != 200, "not serving")

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        context = ssl.create_default_context(cafile=self.ca)
        connection = http.client.HTTPSConnection(HOST, self.port, timeout=15, context=context)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def common_name(self) -> str:
        context = ssl.create_default_context(cafile=self.ca)
        with (
            socket.create_connection((HOST, self.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            found: Any = secured.getpeercert()
        return str(dict(one[0] for one in found["subject"])["commonName"])


@pytest.fixture
def serving(engines: Engines, authority: Authority) -> Iterator[Callable[..., TlsProxy]]:
    started: list[TlsProxy] = []
    TlsProxy.ca = str(authority.ca)

    def start(certificate: Path, key: Path, *flags: str) -> TlsProxy:
        started.append(TlsProxy(engines, "--tls-cert", str(certificate), "--tls-key", str(key), *flags))
        return started[-1]

    yield start
    for one in started:
        eventually(one.wrong, "the proxy is not idle")
        log = one.process.output
        one.stop()
        assert "Traceback" not in log, log


def test_every_kind_of_route_is_served(serving: Callable[..., TlsProxy], authority: Authority) -> None:
    proxy = serving(*authority.issue("proxy", NAMES))
    for path in (COMPLETIONS, CHAT):
        for stream in (False, True):
            fields = body_of(path, num_tokens=30, stream=stream)
            assert proxy.ask("POST", path, fields).text == text_for(fields)
    big = body_of(COMPLETIONS, prompt="p" * 2_000_000, num_tokens=2)
    assert proxy.ask("POST", COMPLETIONS, big).text == text_for(big)
    assert proxy.ask("GET", "/health").status == 200 and b"pd_proxy" in proxy.ask("GET", "/metrics").body
    assert proxy.ask("GET", "/v1/models").status == 200
    assert proxy.ask("POST", "/v1/embeddings", {"input": "a"}).status == 404
    assert proxy.ask("POST", COMPLETIONS, {"prompt": 1}).status == 400


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_is_no_tls_is_not_served_and_harms_nobody(
    serving: Callable[..., TlsProxy], authority: Authority, workers: str
) -> None:
    proxy = serving(*authority.issue("proxy", NAMES), "--header-read-timeout-s", "1", "--workers", workers)
    for said in (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""):
        with socket.create_connection((HOST, proxy.port), timeout=10) as sock:
            sock.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert not sock.recv(100).startswith(b"HTTP/")  # closed in time, even if nothing is said
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(authority.ca)
    with pytest.warns(DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((HOST, proxy.port), timeout=10) as sock, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(sock, server_hostname="localhost")
    assert proxy.ask("GET", "/health").status == 200


def test_a_certificate_is_changed_at_sighup(
    serving: Callable[..., TlsProxy], authority: Authority, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(name: str) -> None:
        for target, source in zip((certificate, key), authority.issue(name, NAMES), strict=True):
            target.write_bytes(source.read_bytes())

    install("first")
    proxy = serving(certificate, key)
    assert proxy.common_name() == "first"
    install("second")
    proxy.process.popen.send_signal(signal.SIGHUP)
    eventually(lambda: proxy.common_name() != "second", "still the old certificate")
    certificate.write_bytes(b"nonsense")
    proxy.process.popen.send_signal(signal.SIGHUP)
    eventually(lambda: "reload_failed" not in proxy.process.output, "not noticed")
    assert proxy.common_name() == "second"


@pytest.mark.parametrize(
    "flags",
    [
        ["--tls-cert", "A"],
        ["--tls-cert", "A", "--tls-key", "OTHER"],
        ["--tls-cert", "/no", "--tls-key", "/no"],
        ["--upstream-tls", "--upstream-ca", "/no"],
        ["--upstream-ca", "A"],
        ["--prefiller-hosts", "https://a"],
        ["--prefiller-hosts", "ftp://a"],
    ],
)
def test_what_cannot_be_used_is_one_line(authority: Authority, flags: list[str]) -> None:
    names = {"A": authority.issue("a", NAMES)[0], "OTHER": authority.issue("other", NAMES)[1]}
    process = Process([PROXY, "--port", "0", *[str(names.get(one, one)) for one in flags]])
    assert process.popen.wait(20) == 2
    output = process.output
    process.stop()
    assert output.count("\n") == 1 and output.startswith("pd-proxy: "), output


def flags_for(engines: Engines, ports: tuple[int, ...], scheme: str = "") -> list[str]:
    num = len(engines.prefill)
    return [
        "--prefiller-hosts", *[scheme + HOST] * num, "--prefiller-ports", *map(str, ports[:num]),
        "--decoder-hosts", *[scheme + HOST] * (len(ports) - num), "--decoder-ports", *map(str, ports[num:]),
    ]  # fmt: skip


def test_instances_behind_tls(start_proxy: Callable[..., Proxy], engines: Engines, authority: Authority) -> None:
    """Requests, probes, capacities, models, fan-outs and what is passed on."""
    with behind_tls([*engines.prefill, *engines.decode], *authority.issue("engine", NAMES)) as ports:
        proxy = start_proxy(*flags_for(engines, ports, "https://"), "--upstream-ca", str(authority.ca))
        for path in (COMPLETIONS, CHAT):
            for stream in (False, True):
                fields = body_of(path, num_tokens=30, stream=stream)
                assert proxy.post(path, fields).text == text_for(fields)
        assert proxy.get("/v1/models").status == 200
        assert request(proxy.port, "POST", "/reset_prefix_cache").status == 200
        engines.answer(engines.prefill[0], "/tokenize", 200)
        assert proxy.post("/tokenize", {"prompt": "a"}).status == 200
        eventually(lambda: proxy.get("/health").status != 200, "not well")
        states = proxy.get("/instances").json["instances"]
        assert all(one["healthy"] for one in states)


@pytest.mark.parametrize("why", ["another authority", "another name", "no TLS at all", "expired"])
def test_an_instance_that_cannot_prove_itself_is_told_nothing(
    start_proxy: Callable[..., Proxy], engines: Engines, authority: Authority, tmp_path: Path, why: str
) -> None:
    other = Authority(tmp_path / "other") if why == "another authority" else authority
    names = "DNS:elsewhere.example" if why == "another name" else NAMES
    certificate, key = other.issue("wrong", names, days=0 if why == "expired" else 2)
    with behind_tls([*engines.prefill, *engines.decode], certificate, key) as secured:
        ports = (*engines.prefill, *engines.decode) if why == "no TLS at all" else secured
        flags = ["--upstream-tls", "--upstream-ca", str(authority.ca)]
        proxy = start_proxy(*flags_for(engines, ports), *flags, "--connect-timeout-s", "2")
        assert proxy.post(COMPLETIONS, FIELDS).status in (502, 503)
        assert proxy.post("/v1/embeddings", {"input": "a"}).status in (502, 503)
        eventually(lambda: proxy.get("/health").status != 503, "well")
        assert not any(engines.count(role, "requests") for role in ("prefill", "decode"))
        if why == "no TLS at all":
            engines.reset()  # they complain of being sent handshakes
            proxy.stop()
        if why == "another name":
            named = start_proxy(*flags_for(engines, ports), *flags, "--upstream-server-name", "elsewhere.example")
            assert named.post(COMPLETIONS, FIELDS).text == text_for(FIELDS)
            insecure = start_proxy(*flags_for(engines, ports), "--upstream-tls", "--upstream-tls-insecure")
            assert insecure.post(COMPLETIONS, FIELDS).text == text_for(FIELDS)


def test_a_client_that_leaves_over_tls_leaves_nothing(
    start_proxy: Callable[..., Proxy], engines: Engines, authority: Authority
) -> None:
    """Half a connection cannot be closed under TLS: the prefill's answer is waited for, and its KV given back."""
    with behind_tls([*engines.prefill, *engines.decode], *authority.issue("engine", NAMES)) as ports:
        proxy = start_proxy(*flags_for(engines, ports, "https://"), "--upstream-ca", str(authority.ca))
        engines.configure(prefill_s=0.3)
        fields = json.dumps(body_of(COMPLETIONS, num_tokens=5)).encode()
        for _ in range(5):
            with socket.create_connection((HOST, proxy.port)) as sock:
                head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(fields)
                sock.sendall(head + fields)
        eventually(proxy.wrong, "not idle")

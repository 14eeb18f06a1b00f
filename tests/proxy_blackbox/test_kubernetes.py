"""`--discover k8s` before a fake API server: pods come and go, and so do the instances."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy_blackbox.admin import at, becomes, change, in_background, shown, state
from tests.proxy_blackbox.api_server import ApiServer
from tests.proxy_blackbox.harness import CHAT, HOST, PROXY, Engines, Proxy, body_of, eventually


class Discovering(Proxy):
    def __init__(self, api: ApiServer, *flags: str) -> None:
        self.num_read = 0
        command = [PROXY, "--host", HOST, "--port", "0", "--discover", "k8s", "--k8s-api", api.url]
        self.start([*command, "--k8s-namespace", "models", *flags])


@pytest.fixture
def api(engines: Engines) -> Iterator[ApiServer]:
    """With a pod for the first prefiller and the first decoder."""
    started = ApiServer()
    started.put("p-0", "prefill", engines.prefill[0])
    started.put("d-0", "decode", engines.decode[0])
    yield started
    started.stop()


@pytest.fixture
def proxy(api: ApiServer, engines: Engines) -> Iterator[Discovering]:
    started = Discovering(api, "--k8s-selector", "app=vllm,tier!=x")
    becomes(started, "prefill", engines.prefill[0], "active")
    becomes(started, "decode", engines.decode[0], "active")
    yield started
    assert "Traceback" not in started.process.output, started.process.output
    assert started.stop() == 0


def watches(api: ApiServer) -> list[str]:
    return [query["resourceVersion"] for _, query, _ in list(api.asked) if "watch" in query]


def lists(api: ApiServer) -> int:
    return sum("watch" not in query and "continue" not in query for _, query, _ in list(api.asked))


def test_pods_are_listed_in_pages_and_serve(proxy: Discovering, api: ApiServer, engines: Engines) -> None:
    assert len(proxy.get("/instances").json["instances"]) == 2, "no default instance besides"
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    path, query, _ = api.asked[0]
    assert path == "/api/v1/namespaces/models/pods" and query["labelSelector"] == "app=vllm,tier!=x"
    assert any("continue" in query for _, query, _ in api.asked)
    assert any(query.get("allowWatchBookmarks") == "true" for _, query, _ in api.asked)
    seen = shown(proxy, "decode", engines.decode[0])
    assert seen is not None and seen["source"] == "kubernetes"


def test_pods_come_and_go(proxy: Discovering, api: ApiServer, engines: Engines) -> None:
    api.put("d-1", "decode", engines.decode[1], ready=False)
    api.put("p-1", "prefill", engines.prefill[1])
    becomes(proxy, "prefill", engines.prefill[1], "active")
    assert state(proxy, "decode", engines.decode[1]) is None, "it is not ready"
    api.put("d-1", "decode", engines.decode[1])
    becomes(proxy, "decode", engines.decode[1], "active")
    api.put("d-0", "decode", engines.decode[0], deletionTimestamp="2026-01-01T00:00:00Z")
    becomes(proxy, "decode", engines.decode[0], None)
    api.delete("p-1")
    becomes(proxy, "prefill", engines.prefill[1], None)
    assert proxy.post(CHAT, body_of(CHAT)).status == 200


def test_a_pod_that_goes_is_drained(proxy: Discovering, api: ApiServer, engines: Engines) -> None:
    fields = body_of(CHAT, num_tokens=30, stream=True, mock={"interval_s": 0.03})
    with in_background(proxy, fields) as answers:
        eventually(lambda: engines.count("decode", "decodes") != 1, "not decoding")
        api.delete("d-0")
        becomes(proxy, "decode", engines.decode[0], "draining")
    assert answers[0].status == 200 and answers[0].events[-1] == "[DONE]"
    becomes(proxy, "decode", engines.decode[0], None)


def test_a_change_of_the_label_is_a_change_of_the_role(proxy: Discovering, api: ApiServer, engines: Engines) -> None:
    port = engines.decode[0]
    api.put("d-0", "both", port)
    becomes(proxy, "prefill", port, "active")
    assert state(proxy, "decode", port) == "active"
    api.put("d-0", "Prefiller", port)
    becomes(proxy, "decode", port, None)
    assert state(proxy, "prefill", port) == "active"


def test_a_watch_goes_on_where_it_ended(proxy: Discovering, api: ApiServer, engines: Engines) -> None:
    eventually(lambda: not watches(api), "no watch")
    api.bookmark()
    before = lists(api)
    api.cut()
    eventually(lambda: len(watches(api)) < 2, "no second watch")
    assert int(watches(api)[-1]) > int(watches(api)[0]) + 40, "from the bookmark on"
    api.put("d-1", "decode", engines.decode[1])
    becomes(proxy, "decode", engines.decode[1], "active")
    assert lists(api) == before


@pytest.mark.parametrize("as_event", [True, False])
def test_after_410_gone_it_lists_again(proxy: Discovering, api: ApiServer, engines: Engines, as_event: bool) -> None:
    api.gone_as_event = as_event
    eventually(lambda: not watches(api), "no watch")
    api.put("d-1", "decode", engines.decode[1])
    becomes(proxy, "decode", engines.decode[1], "active")
    api.delete("d-0", unseen=True)
    api.compact()
    api.cut()
    becomes(proxy, "decode", engines.decode[0], None)
    assert state(proxy, "decode", engines.decode[1]) == "active"
    eventually(lambda: lists(api) != 2, "not one more list")


def test_while_the_api_server_is_down_the_last_answer_holds(
    proxy: Discovering, api: ApiServer, engines: Engines
) -> None:
    eventually(lambda: not watches(api), "no watch")
    api.token = "nobody knows"
    api.cut()
    eventually(lambda: proxy.process.output.count("event=k8s_trouble") < 2, "no trouble")
    assert "401" in proxy.process.output
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    api.token = ""
    api.put("d-1", "decode", engines.decode[1])
    becomes(proxy, "decode", engines.decode[1], "active", 20)


def test_nonsense_from_the_api_server_ends_nothing(proxy: Discovering, api: ApiServer, engines: Engines) -> None:
    """As the listener thread of the example proxy is ended by what it did not expect (ascend-proxy.md 2.1)."""
    eventually(lambda: not watches(api), "no watch")
    api.say({"type": "MODIFIED", "object": [1]})
    eventually(lambda: "event=k8s_trouble" not in proxy.process.output, "not noticed")
    api.put("odd-port", "decode", "many")
    api.put("odd-role", "cook", engines.decode[1])
    api.put("d-1", "decode", engines.decode[1])
    becomes(proxy, "decode", engines.decode[1], "active", 20)
    assert proxy.post(CHAT, body_of(CHAT)).status == 200


def test_what_an_operator_removed_stays_out_until_the_pod_is_gone(
    proxy: Discovering, api: ApiServer, engines: Engines
) -> None:
    port = engines.decode[0]
    change(proxy, "remove", type="decode", instances=at(port))
    becomes(proxy, "decode", port, None)
    api.put("d-0", "decode", port, ready=False)
    api.put("d-0", "decode", port)
    api.put("d-1", "decode", engines.decode[1])
    becomes(proxy, "decode", engines.decode[1], "active")
    assert state(proxy, "decode", port) is None
    api.delete("d-0")
    api.put("d-0", "decode", port)
    becomes(proxy, "decode", port, "active")


def test_the_token_is_read_again_for_every_call(api: ApiServer, engines: Engines, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    api.token = "first"
    proxy = Discovering(api, "--k8s-token-file", str(token), "--k8s-port", str(engines.decode[1]))
    try:
        becomes(proxy, "decode", engines.decode[0], "active")
        eventually(lambda: not watches(api), "no watch")
        api.token = "second"
        token.write_text("second\n")
        api.cut()
        eventually(lambda: len(watches(api)) < 2, "no second watch")
        api.put("d-1", "decode", None)
        becomes(proxy, "decode", engines.decode[1], "active")
        assert {"Bearer first", "Bearer second"} == {given for _, _, given in api.asked}
    finally:
        assert proxy.stop() == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_the_api_server_is_known_by_its_authority(engines: Engines, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=api"]
    more = ["-addext", f"subjectAltName=IP:{HOST}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command, *more], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    api = ApiServer(tls)
    api.put("d-0", "decode", engines.decode[0])
    proxy = Discovering(api, "--k8s-ca-file", str(cert))
    try:
        becomes(proxy, "decode", engines.decode[0], "active")
    finally:
        assert proxy.stop() == 0
        api.stop()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--discover", "k8s"], "--k8s-api"),
        (["--discover", "k8s", "--k8s-api", "https://127.0.0.1:1", "--k8s-ca-file", "/nowhere"], "/nowhere"),
        (["--discover", "k9s"], "--discover"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(flags: list[str], says: str) -> None:
    ended = subprocess.run([PROXY, "--port", "0", *flags], capture_output=True, text=True, timeout=20, env={})
    assert ended.returncode in (1, 2) and says in ended.stderr
    assert ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr

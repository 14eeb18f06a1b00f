"""Who may ask for what: keys of clients and operators, their files as they change, and what instances see of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

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
    connected,
    eventually,
    raw_post,
    read_answer,
    request,
    text_for,
)

Start = Callable[..., Proxy]
FIELDS = body_of(COMPLETIONS, num_tokens=2)
MESSAGES = {"model": "mock", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}
CLOSED = ("/v1/models", "/version", "/instances", "/tokenize", "/docs")
ENGINE_ADMIN = ("/sleep", "/wake_up", "/collective_rpc", "/pause", "/load_lora_adapter", "/v1/load_lora_adapter",
                "/server_info", "/update_weights", "/scale_elastic_ep", "/resume", "/abort_request")  # fmt: skip
SPELLINGS = (
    "/%73leep",
    "//sleep",
    "/x/../sleep",
    "/./sleep",
    "/sleep/",
    "/%2573leep",
    "/SLEEP",
    "/sleep;a=b",
    "/sleep?x=1",
)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask(proxy: Proxy, key: str = "", path: str = COMPLETIONS) -> Answer:
    return request(proxy.port, "POST", path, FIELDS, **(bearer(key) if key else {}))


def is_401(answer: Answer) -> bool:
    assert answer.status != 401 or (
        answer.error["type"] == "AuthenticationError" and answer.headers["www-authenticate"]
    )
    return answer.status == 401


@pytest.fixture
def wipe(engines: Engines, start_proxy: Start) -> Callable[..., Proxy]:
    """Proxies that need a key for /instances are not asked whether they are idle: their engines are."""

    def start(*flags: str, **environment: str) -> Proxy:
        proxy = start_proxy(*flags, **environment)
        proxy.wrong = lambda: None  # type: ignore[method-assign]
        return proxy

    return start


def test_a_client_needs_one_of_the_keys(wipe: Start, engines: Engines) -> None:
    proxy = wipe("--api-key", "one", "--api-key", "two", "three", OPENAI_API_KEY="upstream")
    for key in ("one", "two", "three"):
        assert ask(proxy, key).text == text_for(FIELDS)
    engines.reset()
    wrong = [{}, bearer("four"), bearer("on"), bearer("onee"), bearer("one "+"x"), bearer(""), {"Authorization": "one"},
             {"Authorization": "Basic b25l"}, {"x_api_key": "four"}, {"x_api_key": ""}]  # fmt: skip
    for path in (COMPLETIONS, CHAT, "/v1/embeddings", *CLOSED):
        for headers in wrong:
            assert is_401(request(proxy.port, "POST" if "compl" in path else "GET", path, FIELDS, **headers)), (
                path,
                headers,
            )
    assert not any(engines.count(role, "requests") for role in ("prefill", "decode"))
    for path in ("/health", "/healthcheck", "/ping", "/metrics"):
        assert request(proxy.port, "GET", path).status == 200


def test_an_anthropic_client_sends_its_key_its_way(wipe: Start, engines: Engines) -> None:
    proxy = wipe("--api-key", "one")
    assert request(proxy.port, "POST", "/v1/messages", MESSAGES, x_api_key="one").status == 200
    refused = request(proxy.port, "POST", "/v1/messages", MESSAGES, x_api_key="two")
    assert refused.status == 401 and refused.json["error"]["type"] == "authentication_error"
    for role in ("prefill", "decode"):
        for seen in engines.requests(role):
            assert "x-api-key" not in seen["headers"] and "authorization" not in seen["headers"]


def test_a_request_without_a_key_is_refused_before_its_body_is_sent(wipe: Start) -> None:
    proxy = wipe("--api-key", "one")
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        assert read_answer(sock).status == 401 and sock.recv(1) == b""


def test_two_keys_in_one_request_are_refused(wipe: Start) -> None:
    proxy = wipe("--api-key", "one")
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(COMPLETIONS, json.dumps(FIELDS).encode(), *["Authorization: Bearer one"] * 2))
        assert read_answer(sock).status == 400


@pytest.mark.parametrize("name", ["Authorization", "x-api-key"])
@pytest.mark.parametrize("flags", [["--upstream-api-key", "upstream"], []])
def test_the_instances_see_their_own_key_and_never_a_clients(
    wipe: Start, engines: Engines, flags: list[str], name: str
) -> None:
    environment = {} if flags else {"OPENAI_API_KEY": "upstream"}
    proxy = wipe("--api-key", "one", *flags, **environment)
    value = "Bearer one" if name == "Authorization" else "one"
    for path in (COMPLETIONS, "/v1/embeddings"):
        with connected(proxy.port) as sock:
            sock.sendall(raw_post(path, json.dumps(FIELDS).encode(), f"{name}: {value}"))
            assert read_answer(sock).status in (200, 404)
    seen = [*engines.requests("prefill"), *engines.requests("decode")]
    assert len(seen) >= 2
    for one in seen:
        assert one["headers"]["authorization"] == "Bearer upstream" and "x-api-key" not in one["headers"]


def test_without_keys_of_ours_credentials_pass(wipe: Start, engines: Engines) -> None:
    proxy = wipe("--admin-api-key", "root", OPENAI_API_KEY="upstream")
    assert ask(proxy, "theirs").status == 200 and ask(proxy).status == 200 and ask(proxy, "root").status == 200
    seen = [one["headers"]["authorization"] for one in engines.requests("decode")]
    assert seen == ["Bearer theirs", "Bearer upstream", "Bearer upstream"]  # an admin's key is nobody else's


def test_the_admin_routes_need_the_admins_key(wipe: Start) -> None:
    proxy = wipe("--api-key", "one", "--admin-api-key", "root")
    admin = [("GET", "/instances"), ("POST", "/instances/add"), ("POST", "/reset_prefix_cache"),
             ("POST", "/instances/register"), ("DELETE", "/instances/register"), ("POST", "/start_profile"),
             ("GET", "/%69nstances"), ("GET", "/x/../instances"), ("POST", "//reset_prefix_cache")]  # fmt: skip
    for method, path in admin:
        for headers in ({}, bearer("one"), bearer("two")):
            assert is_401(request(proxy.port, method, path, b"{}", **headers)), (path, headers)
    assert request(proxy.port, "GET", "/instances", **bearer("root")).status == 200
    assert request(proxy.port, "POST", "/reset_prefix_cache", **bearer("root")).status == 200
    assert ask(proxy, "root").status == 200


def test_without_an_admin_key_a_client_key_is_still_asked_for(wipe: Start) -> None:
    proxy = wipe("--api-key", "one")
    assert is_401(request(proxy.port, "GET", "/instances"))
    assert request(proxy.port, "GET", "/instances", **bearer("one")).status == 200


@pytest.mark.parametrize(
    ("who", "statuses"), [("open", (200, 200, 200)), ("client", (401, 200, 200)), ("admin", (401, 401, 200))]
)
def test_metrics(wipe: Start, who: str, statuses: tuple[int, ...]) -> None:
    proxy = wipe("--api-key", "one", "--admin-api-key", "root", "--metrics-auth", who)
    headers = ({}, bearer("one"), bearer("root"))
    assert tuple(request(proxy.port, "GET", "/metrics", **one).status for one in headers) == statuses
    if who == "admin":
        assert is_401(request(proxy.port, "GET", "/%6detrics", **bearer("one")))


@pytest.mark.parametrize("path", [*ENGINE_ADMIN, *SPELLINGS])
def test_what_changes_an_engine_is_not_passed_on(proxy: Proxy, engines: Engines, path: str) -> None:
    for method in ("GET", "POST"):
        assert request(proxy.port, method, path, b"{}").status == 403
    assert not any(engines.count(role, "requests") for role in ("prefill", "decode"))


def test_an_admin_may_change_an_engine(wipe: Start, engines: Engines) -> None:
    engines.answer(engines.prefill[0], "/sleep", 200)
    proxy = wipe("--api-key", "one", "--admin-api-key", "root")
    assert is_401(request(proxy.port, "POST", "/sleep", b"{}", **bearer("one")))
    assert request(proxy.port, "POST", "/sleep", b"{}", **bearer("root")).status in (200, 404)
    allowed = wipe("--api-key", "one", "--allow-engine-admin-routes")
    assert is_401(request(allowed.port, "POST", "/sleep", b"{}"))
    assert request(allowed.port, "POST", "/sleep", b"{}", **bearer("one")).status in (200, 404)


def test_a_file_of_keys_is_followed(wipe: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# those who pay\none\n\n  two  \n")
    keys.chmod(0o600)
    proxy = wipe("--api-key-file", str(keys), "--admin-api-key", "okapi")
    assert [ask(proxy, key).status for key in ("one", "two", "zebra", "#")] == [200, 200, 401, 401]
    (tmp_path / "next").write_text("zebra\n")
    os.replace(tmp_path / "next", keys)
    eventually(lambda: ask(proxy, "zebra").status != 200, "the new key does not work")
    assert is_401(ask(proxy, "one"))
    keys.unlink()  # what cannot be read changes nothing
    eventually(lambda: "keys_not_read" not in proxy.process.output, "not noticed")
    assert ask(proxy, "zebra").status == 200
    keys.write_text("# nobody\n")  # what was emptied lets nobody in
    eventually(lambda: ask(proxy, "zebra").status != 401, "still let in")
    assert is_401(ask(proxy))
    assert "zebra" not in proxy.process.output and "okapi" not in proxy.process.output


def test_keys_of_the_configuration_are_read_again_at_sighup(wipe: Start, tmp_path: Path) -> None:
    config = tmp_path / "proxy.toml"
    config.write_text('api_key = ["one"]\n')
    proxy = wipe("--config", str(config))
    assert [ask(proxy, key).status for key in ("one", "two")] == [200, 401]
    config.write_text('api_key = ["two"]\n')
    proxy.process.popen.send_signal(signal.SIGHUP)
    eventually(lambda: ask(proxy, "two").status != 200, "the new key does not work")
    assert is_401(ask(proxy, "one"))
    config.write_text('api_key = ["a b"]\n')
    proxy.process.popen.send_signal(signal.SIGHUP)
    eventually(lambda: "reload_failed" not in proxy.process.output, "not noticed")
    assert ask(proxy, "two").status == 200


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere: cannot read it"),
        (["--api-key", "a b"], "--api-key: a key is printable ASCII"),
        (["--admin-api-key-file", "EMPTY"], "names no key"),
        (["--upstream-api-key", "a", "--upstream-api-key-file", "b"], "give one of them"),
        (["--upstream-api-key-file", "/nowhere"], "cannot read it"),
        (["--metrics-auth", "all"], "--metrics-auth"),
        (["--metaserver-allow", "10.0.0.0/33"], "--metaserver-allow"),
    ],
)
def test_keys_that_cannot_be_used_are_one_line(tmp_path: Path, flags: list[str], says: str) -> None:
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "empty").chmod(0o600)
    process = Process([PROXY, "--port", "0", *[str(tmp_path / "empty") if one == "EMPTY" else one for one in flags]])
    assert process.popen.wait(20) == 2
    output = process.output
    process.stop()
    assert says in output and output.count("\n") == 1, output


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--admin-api-key", "root"], False),
        (["--host", HOST], False),
    ],
)
def test_an_open_admin_route_is_told_of(flags: list[str], warned: bool) -> None:
    process = Process([PROXY, "--port", "0", *flags])
    process.wait_for("ready listen")
    process.popen.send_signal(signal.SIGTERM)
    process.popen.wait(20)
    assert ("admin_is_open" in process.output) is warned
    process.stop()

"""What only connectors and who routes to them may say: refused in bodies, dropped from heads, on every route."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    HOST,
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

KV = b'{"do_remote_prefill": true, "remote_host": "10.0.0.1", "remote_port": 1}'
REST = b'"model": "mock", "max_tokens": 2'
BODIES = {
    COMPLETIONS: b'"prompt": "a", ' + REST,
    CHAT: b'"messages": [{"role": "user", "content": "a"}], ' + REST,
    "/v1/responses": b'"input": "a", "model": "mock"',
    "/v1/messages": b'"messages": [{"role": "user", "content": "a"}], ' + REST,
    "/v1/embeddings": b'"input": "a"',
    "/inference/v1/generate": b'"token_ids": [1]',
}
MEMBERS = {
    "plain": b'"kv_transfer_params": ' + KV,
    "escaped": b'"kv\\u005ftransfer_params": ' + KV,
    "escaped all over": b'"' + b"".join(b"\\u%04x" % one for one in b"kv_transfer_params") + b'": ' + KV,
    "twice, the last counts": b'"kv_transfer_params": null, "kv_transfer_params": ' + KV,
    "twice, one is escaped": b'"kv_transfer_params": null, "kv_transfer_param\\u0073": ' + KV,
    "by another way in": b'"vllm_xargs": {"kv_transfer_params": ' + KV + b"}",
    "a host": b'"bootstrap_host": "10.0.0.1"',
    "a port": b'"bootstrap_port": 1',
    "a room": b'"bootstrap_room": 7',
    "an escaped host": b'"boot\\u0073trap_host": "10.0.0.1"',
}


def nobody_was_asked(engines: Engines) -> bool:
    return not any(engines.count(role, "requests") for role in ("prefill", "decode"))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("first", [True, False])
def test_bodies(proxy: Proxy, engines: Engines, path: str, first: bool) -> None:
    for name, member in MEMBERS.items():
        body = b"{" + b", ".join([member, BODIES[path]] if first else [BODIES[path], member]) + b"}"
        answer = proxy.post(path, body)
        assert answer.status == 400, (name, answer)
        assert b"not accepted from clients" in answer.body, name
    assert nobody_was_asked(engines)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions/", "/inference/v1/generate"])
def test_bodies_by_another_name_or_in_another_writing(proxy: Proxy, engines: Engines, path: str) -> None:
    text = '{"input": "a", "kv_transfer_params": {"remote_host": "10.0.0.1"}}'
    for content_type in (
        "application/json",
        "text/plain",
        "application/octet-stream",
        "audio/wav",
        "multipart/form-data; boundary=a",
        "x/y+json",
        "",
        "a",
    ):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
            for blanks in ("", "\n \t", " " * 100):
                body = (blanks + text).encode(encoding)
                assert request(proxy.port, "POST", path, body, Content_Type=content_type).status == 400, (
                    content_type,
                    encoding,
                )
    compressed = request(proxy.port, "POST", path, b"\x1f\x8b", Content_Type="text/plain", Content_Encoding="gzip")
    assert compressed.status == 415
    assert nobody_was_asked(engines)


def test_an_empty_one_does_not_hide_another(proxy: Proxy, engines: Engines) -> None:
    body = b'{"kv_transfer_params": %b, %b, "kv_transfer_params": null}' % (KV, BODIES[COMPLETIONS])
    assert proxy.post(COMPLETIONS, body).status == 200
    for seen in (*engines.requests("prefill"), *engines.requests("decode")):
        assert seen["body"]["kv_transfer_params"].get("remote_host") != "10.0.0.1"


def test_heads(proxy: Proxy, engines: Engines) -> None:
    """Those of a client that no engine may see, those it must see, and the id and the trace."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    connectors = "X-data-parallel-rank x-prefiller-host-port X-KV-Params X_Kv_Rank X-Bootstrap-Host X-Disagg-Room"
    dropped = (*connectors.split(), "X-Remote-Host", "Proxy-Authorization", "Keep-Alive", "TE", "Upgrade", "X-Mine")
    lines = [f"{name}: 1" for name in dropped]
    body = json.dumps(body_of(COMPLETIONS)).encode()
    kept = [f"traceparent: {trace}", "tracestate: a=b", "X-Request-Id: id-1", "X-Yours: 2", "Connection: X-Mine, TE"]
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(COMPLETIONS, body, *lines, *kept))
        answer = read_answer(sock)
    assert answer.headers["x-request-id"] == "id-1"
    for role in ("prefill", "decode"):
        (seen,) = engines.requests(role)
        headers: dict[str, Any] = seen["headers"]
        assert not {name.lower() for name in dropped} & headers.keys() and "connection" not in headers
        assert headers["traceparent"] == trace and headers["tracestate"] == "a=b" and headers["x-yours"] == "2"
        assert headers["x-request-id"] == "id-1"
    assert proxy.get("/health").headers["x-request-id"] and proxy.post(COMPLETIONS, body).headers["x-request-id"]


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 2}])
def test_engines_never_have_two_requests_of_one_id(proxy: Proxy, engines: Engines, more: dict[str, Any]) -> None:
    """They find requests, and the KV of one that waits to be fetched, by it; the client sees its own all the same."""
    slow, quick = (
        body_of(COMPLETIONS, num_tokens=8, stream=True, mock={"interval_s": 0.1}),
        body_of(COMPLETIONS, **more),
    )
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(COMPLETIONS, json.dumps(slow).encode(), "X-Request-Id: same"))
        eventually(lambda: not engines.count("decode", "requests"), "not begun")
        answer = proxy.post(COMPLETIONS, quick, X_Request_Id="same")
        assert answer.status == 200 and answer.headers["x-request-id"] == "same" and b'"cmpl-same"' in answer.body
        assert read_answer(sock).text == text_for(slow)
    for role in ("prefill", "decode"):
        seen = [str(one["headers"]["x-request-id"]) for one in engines.requests(role)]
        assert len(set(seen)) == len(seen) > 1 and "same" in seen and all(one.startswith("same") for one in seen)
    engines.reset()
    assert proxy.post(COMPLETIONS, body_of(COMPLETIONS), X_Request_Id="same").status == 200
    assert [one["headers"]["x-request-id"] for one in engines.requests("decode")] == ["same"]


def test_an_id_that_names_addresses_is_not_used(proxy: Proxy, engines: Engines) -> None:
    """vLLM's P2pNcclConnector finds out from the id where KV comes from, and where it goes."""
    forged = "cmpl-___prefill_addr_10.0.0.1:1___decode_addr_10.0.0.2:2_x"
    answer = proxy.post(COMPLETIONS, body_of(COMPLETIONS), X_Request_Id=forged)
    assert answer.text == text_for(body_of(COMPLETIONS)) and answer.headers["x-request-id"] != forged
    for seen in (*engines.requests("prefill"), *engines.requests("decode")):
        assert "_addr_" not in seen["headers"]["x-request-id"]


@pytest.mark.parametrize(("allow", "status"), [([], 403), (["any"], 404), (["127.0.0.0/8"], 404)])
def test_the_metaserver_answers_decoders_only(
    start_proxy: Callable[..., Proxy], engines: Engines, allow: list[str], status: int
) -> None:
    """A decoder's address, and an id that was issued: here the decoder is elsewhere, or the id is made up."""
    flags = ["--metaserver-allow", *allow] if allow else []
    elsewhere = ["--decoder-hosts", "192.0.2.1", "192.0.2.1", "--contract", "layerwise"]
    proxy = start_proxy(*elsewhere, *flags, "--connect-timeout-s", "0.2")
    asked = {"request_id": "cmpl-made-up-0", "remote_host": HOST, "remote_port": 1}
    answer = proxy.post("/v1/metaserver", asked)
    assert answer.status == status and answer.error
    here = start_proxy("--contract", "layerwise")
    assert here.post("/v1/metaserver", asked).status == 404
    assert Counter(one["headers"].get("host") for one in engines.requests("prefill")) == Counter()

"""/v1/responses and /v1/messages: the same story under their own names, with their own errors and events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from bench.mock_answers import script_of
from bench.mock_other_apis import events, whole
from tests.proxy_blackbox.harness import Answer, Engines, Proxy, eventually

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BOTH = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])


def body_of(path: str, **more: Any) -> dict[str, Any]:
    if path == RESPONSES:
        return {"model": "mock", "input": "Say it", "max_output_tokens": 5, **more}
    return {"model": "mock", "messages": [{"role": "user", "content": "Say it"}], "max_tokens": 5, **more}


def api_of(path: str) -> str:
    return path.rpartition("/")[2]


@BOTH
def test_a_whole_answer_is_the_decoders(proxy: Proxy, engines: Engines, path: str) -> None:
    fields = body_of(path)
    answer = proxy.post(path, fields, X_Request_Id="r-1", anthropic_version="2023-06-01")
    assert (answer.status, answer.body) == (200, whole(api_of(path), script_of(fields), "r-1", "mock", 0))
    (prefill,), (decode,) = engines.requests("prefill"), engines.requests("decode")
    assert decode["body"].pop("kv_transfer_params")["do_remote_prefill"] is True
    assert decode["body"] == fields
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    assert (prefill["body"][limit], prefill["body"]["stream"]) == (1, False)
    assert prefill["body"].get("min_tokens") == (1 if path == RESPONSES else None), "no field of /v1/messages"
    assert prefill["headers"]["anthropic-version"] == "2023-06-01"


@BOTH
def test_a_stream_is_the_decoders(proxy: Proxy, engines: Engines, path: str) -> None:
    fields = body_of(path, stream=True)
    answer = proxy.post(path, fields, X_Request_Id="r-1")
    assert answer.body == b"".join(events(api_of(path), script_of(fields), "r-1", "mock"))
    assert engines.count("prefill", "prefills") == 1


@BOTH
def test_an_error_as_first_event_is_retried(proxy: Proxy, engines: Engines, path: str) -> None:
    """What opens the stream comes before the error, and commits to nothing."""
    engines.fault("decode", "error_event", count=1, shared=True)
    fields = body_of(path, stream=True)
    answer = proxy.post(path, fields, X_Request_Id="r-1")
    assert answer.status == 200 and b"event: error" not in answer.body
    assert engines.count("decode", "faults") == 1 and engines.count("prefill", "prefills") == 2


@BOTH
def test_an_engine_that_does_not_serve_it_says_so(proxy: Proxy, engines: Engines, path: str) -> None:
    engines.fault("prefill", "status", status=404, message="Not Found")
    answer = proxy.post(path, body_of(path))
    assert answer.status == 404 and answer.error["message"] == "Not Found"


CACHED = {"cached_tokens": 2, "decoder_cached_tokens": 6}


def usages(answer: Answer) -> list[dict[str, Any]]:
    """Every usage of a stream of named events."""
    told = [json.loads(line[6:]) for line in answer.body.split(b"\n") if line.startswith(b"data: ")]
    holders = [holder for one in told for holder in (one, one.get("response"), one.get("message")) if holder]
    return [holder["usage"] for holder in holders if holder.get("usage")]


def test_cached_tokens_of_responses_are_the_prefillers(proxy: Proxy) -> None:
    fields = body_of(RESPONSES, mock=CACHED)
    assert proxy.post(RESPONSES, fields).json["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    found = usages(proxy.post(RESPONSES, {**fields, "stream": True}))
    assert found and all(usage["input_tokens_details"] == {"cached_tokens": 2} for usage in found)


def test_cached_tokens_of_messages_are_the_prefillers(proxy: Proxy) -> None:
    """What was read from a cache is no input there: the sum stays."""
    fields = body_of(MESSAGES, mock=CACHED)
    num_prompt = script_of(fields).num_prompt_tokens
    found = [proxy.post(MESSAGES, fields).json["usage"], *usages(proxy.post(MESSAGES, {**fields, "stream": True}))]
    assert len(found) == 3
    for usage in found:
        assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (2, num_prompt - 2)


@BOTH
@pytest.mark.parametrize("kind", ["reset_mid", "close_mid", "garbage_mid", "hang_mid"])
def test_a_decoder_that_is_lost_in_mid_stream_is_told_of(
    start_proxy: Callable[..., Proxy], engines: Engines, path: str, kind: str
) -> None:
    """These streams are not continued: what was said can't be put behind the input exactly."""
    engines.fault("decode", kind, after=2)
    proxy = start_proxy("--between-tokens-timeout-s", "1")
    fields = body_of(path, stream=True)
    answer = proxy.post(path, fields, X_Request_Id="r-1")
    given = b"".join(events(api_of(path), script_of(fields), "r-1", "mock")[:4])
    assert answer.status == 200 and answer.body.startswith(given)
    name, _, data = answer.body.removeprefix(given).decode().partition("\n")
    told = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and told["type"] == "error" and data.endswith("}\n\n")
    assert engines.count("decode", "decodes") == 1


@BOTH
def test_a_stream_that_was_whole_but_for_its_end_is_no_error(proxy: Proxy, engines: Engines, path: str) -> None:
    engines.fault("decode", "reset_mid", after=99)
    fields = body_of(path, stream=True)
    answer = proxy.post(path, fields, X_Request_Id="r-1")
    assert answer.body == b"".join(events(api_of(path), script_of(fields), "r-1", "mock"))


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"model": "mock", "max_tokens": 3}, "messages"), ({"messages": [], "max_tokens": 0}, "max_tokens")],
)
def test_errors_of_messages_have_anthropics_shape(
    proxy: Proxy, engines: Engines, fields: dict[str, Any], word: str
) -> None:
    answer = proxy.post(MESSAGES, fields)
    assert answer.status == 400 and answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error" and word in answer.json["error"]["message"]
    assert engines.count("prefill", "requests") == 0


def test_errors_of_responses_have_openais_shape(proxy: Proxy) -> None:
    answer = proxy.post(RESPONSES, {"model": "mock"})
    assert answer.status == 400 and answer.error["param"] == "input"


@BOTH
def test_without_an_instance_the_error_has_the_apis_shape(proxy: Proxy, engines: Engines, path: str) -> None:
    for port in engines.prefill:
        engines.stop(port)
    answer = proxy.post(path, body_of(path))
    assert answer.status == 503
    assert answer.json["error"]["type"] == ("overloaded_error" if path == MESSAGES else answer.error["type"])
    for port in engines.prefill:
        engines.start(port)
    eventually(
        lambda: [one for one in proxy.get("/instances").json["instances"] if not one["healthy"]],
        "instances are out that are up again",
    )


def test_a_clients_own_kv_transfer_params_are_refused_here_too(proxy: Proxy) -> None:
    answer = proxy.post(MESSAGES, body_of(MESSAGES, kv_transfer_params={"do_remote_prefill": True}))
    assert answer.status == 400 and "kv_transfer_params" in answer.json["error"]["message"]


def test_a_response_that_goes_on_from_a_stored_one_stays_whole(proxy: Proxy, engines: Engines) -> None:
    assert proxy.post(RESPONSES, body_of(RESPONSES, previous_response_id="resp_0")).status == 200
    assert engines.count("prefill", "requests") == 0


@BOTH
def test_what_is_abandoned_is_reclaimed_under_the_same_names(proxy: Proxy, engines: Engines, path: str) -> None:
    engines.fault("decode", "status", status=403, message="no")
    assert proxy.post(path, body_of(path)).status == 403
    # the fixture waits for the KV to be released, and the mock checks the limit it is asked with


def test_a_stream_that_breaks_ends_with_the_apis_error(proxy: Proxy, engines: Engines) -> None:
    engines.fault("decode", "error_event_mid", after=2)
    answer = proxy.post(MESSAGES, body_of(MESSAGES, stream=True))
    last = answer.body.decode().rstrip().rpartition("\n\n")[2]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["type"] == "error"

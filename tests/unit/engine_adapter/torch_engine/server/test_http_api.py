"""The HTTP surface over real sockets, with an engine that says what the test wants."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import aiohttp
import pytest

from engine_adapter.torch_engine.sequence import EngineRequest, RequestOutput
from engine_adapter.torch_engine.tokenizer import Tokenizer
from tests.unit.engine_adapter.torch_engine.server.fake_engine import (
    MAX_BODY_BYTES,
    ScriptedEngine,
    Serving,
    fails,
    says,
    serving,
)

HI = [{"role": "user", "content": "x"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
OFFER = {"do_remote_prefill": True, "remote_engine_id": "p"}
REMOTE: dict[str, Any] = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1]], "remote_engine_id": "p",
    "remote_request_id": "r", "remote_host": "127.0.0.1", "remote_port": 1, "remote_num_tokens": 2,
    "remote_blocks_expiry_time": 1.0, "remote_prefill_cached_tokens": 9,
    "baton": {"version": 1, "transfer_id": "t", "token": "k", "epoch": "e", "num_blocks": 1},
}  # fmt: skip


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def post(at: Serving, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(at.url + path, data=raw, headers={"Content-Type": "application/json"} | headers) as response,
    ):
        text = await response.text()
        return response.status, json.loads(text) if response.content_type == "application/json" else text


def events(text: str) -> list[Any]:
    return [line if line == "[DONE]" else json.loads(line) for line in re.findall(r"^data: (.*)$", text, re.M)]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def raw_exchange(at: Serving, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
    writer.write(request)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


def http(path: str, body: bytes, extra: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + extra + b"\r\n" + body


async def test_a_request_id_is_the_answers_id_and_is_echoed(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70)), tokenizer) as at:
        answer = await raw_exchange(
            at, http("/v1/completions", b'{"prompt": "x"}', b"X-Request-Id: abc\r\nConnection: close\r\n")
        )
        assert b"X-Request-Id: abc\r\n" in answer
        assert b'"id":"cmpl-abc"' in answer
        _, chat = await post(at, "/v1/chat/completions", {"messages": HI}, **{"X-Request-Id": "abc"})
        assert chat["id"] == "chatcmpl-abc"


async def test_two_requests_with_one_id_do_not_meet(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70, 71)), tokenizer) as at:
        both = await asyncio.gather(
            *(post(at, "/v1/completions", {"prompt": "x"}, **{"X-Request-Id": "same"}) for _ in range(2))
        )
        assert [status for status, _ in both] == [200, 200]
        assert len({request.request_id for request in at.engine.submitted}) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_error_keeps_its_status(tokenizer: Tokenizer, stream: bool) -> None:
    async with serving(ScriptedEngine(fails(503, "kv_load_error")), tokenizer) as at:
        status, answer = await post(at, "/v1/completions", {"prompt": "x", "stream": stream})
        assert status == 503
        assert answer == {"error": {"message": "it went wrong", "type": "kv_load_error", "param": None, "code": 503}}
        assert at.engine.aborted == []


async def test_the_head_of_a_stream_waits_for_the_first_token(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(http("/v1/completions", b'{"prompt": "x", "stream": true}'))
        await until(lambda: at.engine.submitted)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        at.engine.emit([RequestOutput(at.engine.submitted[0].request_id, [70], finish_reason="length")])
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_an_error_after_the_head_is_an_event(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70, finish=None)), tokenizer) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(http("/v1/completions", b'{"prompt": "x", "stream": true}', b"Connection: close\r\n"))
        await reader.readuntil(b"data: ")
        fails(500, "InternalServerError")(at.engine, at.engine.submitted[0])
        rest = events("data: " + (await reader.read()).decode())
        assert [event if event == "[DONE]" else next(iter(event)) for event in rest] == ["id", "error", "[DONE]"]
        writer.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_closed_connection_aborts(tokenizer: Tokenizer, path: str, tokens: int) -> None:
    async with serving(ScriptedEngine(says(*[70] * tokens, finish=None)), tokenizer) as at:
        body = {"prompt": "x", "messages": HI, "stream": tokens > 0, "n": 2}
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(http(path, json.dumps(body).encode()))
        if tokens:
            await reader.readuntil(b"data: ")
        await until(lambda: len(at.engine.submitted) == 2)
        writer.close()
        await until(lambda: len(at.engine.aborted) == 2)
        assert sorted(at.engine.aborted) == sorted(request.request_id for request in at.engine.submitted)
        await until(lambda: at.service.num_in_flight == 0)
        assert at.service.router.num_open == 0


async def test_a_stop_string_across_tokens_ends_the_engine_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four", add_special_tokens=False)
    async with serving(ScriptedEngine(says(*ids, finish=None)), tokenizer) as at:
        for stream in (False, True):
            status, answer = await post(
                at, "/v1/completions", {"prompt": "x", "stop": ["o three"], "stream": stream, "max_tokens": 50}
            )
            assert status == 200
            parts = events(answer)[:-1] if stream else [answer]
            assert "".join(part["choices"][0]["text"] for part in parts) == "one tw"
            last = parts[-1]["choices"][0]
            assert (last["finish_reason"], last["stop_reason"]) == ("stop", "o three")
        assert at.engine.aborted == [request.request_id for request in at.engine.submitted]


async def test_the_stop_token_is_not_in_the_text_but_is_counted(tokenizer: Tokenizer) -> None:
    def script(engine: ScriptedEngine, request: EngineRequest) -> None:
        engine.emit([RequestOutput(request.request_id, [70])])
        engine.emit([RequestOutput(request.request_id, [71], finish_reason="stop", stop_reason=71)])

    async with serving(ScriptedEngine(script), tokenizer) as at:
        body = {"prompt": "x", "stop_token_ids": [71], "return_token_ids": True}
        _, answer = await post(at, "/v1/completions", body)
        choice = answer["choices"][0]
        assert choice["text"] == tokenizer.decode([70])
        assert (choice["finish_reason"], choice["stop_reason"], choice["token_ids"]) == ("stop", 71, [70, 71])
        assert answer["usage"]["completion_tokens"] == 2
        _, answer = await post(at, "/v1/completions", body | {"include_stop_str_in_output": True})
        assert answer["choices"][0]["text"] == tokenizer.decode([70, 71])


async def test_lists_and_n_are_choices_in_order_with_their_own_seeds(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70)), tokenizer) as at:
        _, answer = await post(at, "/v1/completions", {"prompt": [[1, 2], [3]], "n": 2, "seed": 5})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [request.prompt_token_ids for request in at.engine.submitted] == [[1, 2], [1, 2], [3], [3]]
        assert [request.sampling.seed for request in at.engine.submitted] == [5, 6, 5, 6]
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 4


async def test_one_write_a_step_one_event_a_choice(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        task = asyncio.create_task(post(at, "/v1/completions", {"prompt": "x", "n": 2, "stream": True}))
        await until(lambda: len(at.engine.submitted) == 2)
        ids = [request.request_id for request in at.engine.submitted]
        for step in range(3):
            reason = "length" if step == 2 else None
            at.engine.emit([RequestOutput(name, [70 + step], finish_reason=reason) for name in ids])  # type: ignore[arg-type]
        _, text = await task
        assert [event["choices"][0]["index"] for event in events(text)[:-1]] == [0, 1, 0, 1, 0, 1]


async def test_chat_chunks(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70, 71)), tokenizer) as at:
        body = {"messages": HI, "stream": True, "return_token_ids": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
        _, text = await post(at, "/v1/chat/completions", body)
        opening, first, second, final, done = events(text)
        assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert opening["prompt_token_ids"] == at.engine.submitted[0].prompt_token_ids
        assert first["choices"][0]["delta"] == {"content": tokenizer.decode([70])}
        assert (first["choices"][0]["token_ids"], first["usage"]["completion_tokens"]) == ([70], 1)
        assert second["choices"][0]["finish_reason"] == "length"
        assert (final["choices"], final["usage"]["completion_tokens"], done) == ([], 2, "[DONE]")
        assert at.engine.submitted[0].sampling.max_tokens == 128 - len(opening["prompt_token_ids"])


async def test_an_offer_is_in_the_answer_and_stays_when_it_was_delivered(tokenizer: Tokenizer) -> None:
    def script(engine: ScriptedEngine, request: EngineRequest) -> None:
        engine.emit([RequestOutput(request.request_id, [70], finish_reason="length", kv_transfer_params=OFFER)])

    async with serving(ScriptedEngine(script), tokenizer) as at:
        body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        _, answer = await post(at, "/v1/completions", body)
        assert answer["kv_transfer_params"] == OFFER
        _, answer = await post(at, "/v1/chat/completions", body | {"messages": HI})
        assert answer["kv_transfer_params"] == OFFER
        assert at.engine.aborted == []


async def test_an_offer_nobody_was_told_of_is_revoked(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        body = {"prompt": "x", "n": 2, "kv_transfer_params": {"do_remote_decode": True}}
        _, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(http("/v1/completions", json.dumps(body).encode()))
        await until(lambda: len(at.engine.submitted) == 2)
        first, second = at.engine.submitted
        assert (first.kv_transfer_params, second.kv_transfer_params) == ({"do_remote_decode": True}, None)
        at.engine.emit([RequestOutput(first.request_id, [70], finish_reason="length", kv_transfer_params=OFFER)])
        await asyncio.sleep(0.02)
        assert at.engine.aborted == []
        writer.close()
        await until(lambda: at.service.num_in_flight == 0)
        assert at.engine.aborted == [first.request_id, second.request_id]


async def test_a_stream_offers_nothing(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70)), tokenizer) as at:
        await post(
            at, "/v1/completions", {"prompt": "x", "stream": True, "kv_transfer_params": {"do_remote_decode": True}}
        )
        assert at.engine.submitted[0].kv_transfer_params is None


async def test_remote_kv_is_pulled_by_the_first_choice_and_found_by_the_others(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        task = asyncio.create_task(post(at, "/v1/completions", {"prompt": "x", "n": 3, "kv_transfer_params": REMOTE}))
        await until(lambda: at.engine.submitted)
        assert len(at.engine.submitted) == 1
        at.engine.on_submit = says(71)
        at.engine.emit([RequestOutput(at.engine.submitted[0].request_id, [70], finish_reason="length")])
        status, answer = await task
        assert status == 200
        assert [request.kv_transfer_params for request in at.engine.submitted] == [REMOTE, None, None]
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 9}


async def test_release_only_generates_nothing(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": REMOTE | {"release_only": True}}
        status, answer = await post(at, "/v1/completions", body)
        assert status == 200
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")
        assert answer["usage"]["completion_tokens"] == 0
        assert at.engine.submitted[0].kv_transfer_params == REMOTE | {"release_only": True}
        assert at.service.router.num_open == 0


@pytest.mark.parametrize(("max_tokens", "released"), [(500, True), (5, False)])
async def test_kv_of_a_refused_request_is_released(tokenizer: Tokenizer, max_tokens: int, released: bool) -> None:
    async with serving(ScriptedEngine(fails(503, "kv_load_error")), tokenizer) as at:
        await post(at, "/v1/completions", {"prompt": "x", "max_tokens": max_tokens, "kv_transfer_params": REMOTE})
        releases = [r for r in at.engine.submitted if (r.kv_transfer_params or {}).get("release_only")]
        assert bool(releases) is released


@pytest.mark.parametrize("key", ["baton", "remote_host", "remote_block_ids"])
async def test_incomplete_kv_parameters_are_a_400(tokenizer: Tokenizer, key: str) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        params = {name: value for name, value in REMOTE.items() if name != key}
        status, answer = await post(at, "/v1/completions", {"prompt": "x", "kv_transfer_params": params})
        assert status == 400
        assert answer["error"]["param"].startswith(f"kv_transfer_params.{key}")
        assert at.engine.submitted == []


async def test_a_dead_engine_is_a_503(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(alive=False), tokenizer) as at:
        status, answer = await post(at, "/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (503, "ServiceUnavailableError")
        async with aiohttp.ClientSession() as session, session.get(at.url + "/health") as response:
            assert response.status == 503


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "`other`"),
        ("/v1/completions", {"prompt": "word " * 200}, 400, "maximum context length is 128 tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 128}, 400, "maximum context length is 128 tokens"),
        ("/v1/completions", {"prompt": [1024]}, 400, "Token id 1024 is out of vocabulary"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"1024": 1}}, 400, "out-of-vocab"),
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b"x" * (MAX_BODY_BYTES + 1), 413, str(MAX_BODY_BYTES)),
        ("/v1/chat/completions", {"messages": IMAGE}, 400, "image_url"),
        ("/v1/chat/completions", {"messages": HI, "chat_template": "{{"}, 400, "template"),
        ("/detokenize", {"tokens": [1024]}, 400, "out of vocabulary"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "other"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "GET"),
    ],
)  # fmt: skip
async def test_refusals(tokenizer: Tokenizer, path: str, body: Any, status: int, word: str) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        got, answer = await post(at, path, body)
        assert got == status
        assert word in answer["error"]["message"]
        assert answer["error"]["code"] == status
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert at.engine.submitted == []


async def test_other_content_types_are_refused_as_in_vllm(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        status, answer = await post(at, "/v1/completions", b"{}", **{"Content-Type": "text/plain"})
        assert (status, answer["error"]["param"]) == (400, "Content-Type")


async def test_a_compressed_body_is_refused_without_traceback(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        status, answer = await post(at, "/v1/completions", b"{}", **{"Content-Encoding": "gzip"})
        assert (status, answer["error"]["param"]) == (415, "Content-Encoding")
        assert (await post(at, "/v1/completions", b"{", **{"Content-Encoding": "identity"}))[0] == 400
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "request_bytes",
    [b"GET /health HTTP/1.1\r\nbad header\r\n\r\n", b"nonsense\r\n\r\n",
     b"GET /health HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
     POST + b"Content-Length: x\r\n\r\n",
     POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"],
    ids=["header", "line", "long", "length", "chunk"],
)  # fmt: skip
async def test_what_is_no_http_is_a_400_without_traceback(
    tokenizer: Tokenizer, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        answer = await raw_exchange(at, request_bytes)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 400
        assert "Traceback" not in caplog.text
        assert not [record for record in caplog.records if record.exc_info]


async def test_expect_100_continue(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70)), tokenizer) as at:
        body = b'{"prompt": "x"}'
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(http("/v1/completions", body, b"Expect: 100-continue\r\nConnection: close\r\n")[: -len(body)])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_client_that_does_not_read_stops_nobody(tokenizer: Tokenizer) -> None:
    """The engine gives all its tokens, another client is served, and the slow one gets everything in the end."""
    async with serving(ScriptedEngine(), tokenizer) as at:
        at.engine.max_model_len = 100_000
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", at.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        writer.write(http("/v1/completions", b'{"prompt": "x", "stream": true, "max_tokens": 20000}'))
        await until(lambda: at.engine.submitted)
        name = at.engine.submitted[0].request_id
        for step in range(2000):
            at.engine.emit([RequestOutput(name, [70] * 100, finish_reason="length" if step == 1999 else None)])
        at.engine.on_submit = says(71)
        status, _ = await post(at, "/v1/completions", {"prompt": "y"})
        assert (status, at.service.num_in_flight) == (200, 1)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received = received[-64:] + await asyncio.wait_for(reader.read(1 << 20), 5)
        assert b"data: [DONE]" in received
        writer.close()


async def test_draining_refuses_new_requests_only(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at:
        task = asyncio.create_task(post(at, "/v1/completions", {"prompt": "x"}))
        await until(lambda: at.engine.submitted)
        at.service.draining = True
        status, _ = await post(at, "/v1/completions", {"prompt": "x"})
        assert status == 503
        at.engine.emit([RequestOutput(at.engine.submitted[0].request_id, [70], finish_reason="length")])
        assert (await task)[0] == 200


async def test_plain_pages(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(), tokenizer) as at, aiohttp.ClientSession(at.url) as session:
        models = await (await session.get("/v1/models")).json()
        assert models["data"][0] | {"created": 0} == {
            "id": "tiny", "object": "model", "created": 0, "owned_by": "baton", "root": "/models/tiny",
            "parent": None, "max_model_len": 128, "permission": [],
        }  # fmt: skip
        assert (await session.get("/health")).status == 200
        assert "version" in await (await session.get("/version")).json()
        assert (await (await session.get("/server_info")).json())["role"] == "both"
        tokens = await (await session.post("/tokenize", json={"prompt": "hello", "return_token_strs": True})).json()
        assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
        text = await (await session.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        assert text == {"prompt": "hello"}
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        assert (await (await session.post("/tokenize", json=chat)).json())["count"] > tokens["count"]


async def test_what_the_template_is_given(tokenizer: Tokenizer) -> None:
    async with serving(ScriptedEngine(says(70), max_model_len=1024), tokenizer) as at:
        template = "{{ messages | tojson }}|{{ tools | tojson }}|{{ colour }}|{{ add_generation_prompt }}"
        body = {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                {"role": "tool", "content": "42", "tool_call_id": "t"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "chat_template": template,
            "chat_template_kwargs": {"colour": "red"},
        }
        status, _ = await post(at, "/v1/chat/completions", body)
        assert status == 200
        messages, tools, colour, prompted = tokenizer.decode(at.engine.submitted[0].prompt_token_ids).split("|")
        assert json.loads(messages) == [
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "42", "tool_call_id": "t"},
        ]
        assert (json.loads(tools), colour, prompted) == (body["tools"], "red", "True")

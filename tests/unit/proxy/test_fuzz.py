"""Bytes that nobody would send: whatever comes, the answer is one of ours, nothing is left open, nothing is raised.

Bounded: a few hundred examples a test, the same ones in every run. `--hypothesis-seed` finds others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import sse
from proxy.access import plain_path
from proxy.auto_contract import contract_of
from proxy.bootstrap import engines_of
from proxy.capacity import kv_tokens_of
from proxy.chunked_body import ChunkDecoder
from proxy.client_stream import ClientStream
from proxy.continuation import NotExact, delivered_in
from proxy.contracts import CONTRACTS
from proxy.errors import BadHead, BadRequest, UpstreamFailure
from proxy.handed_over import rebuilt_head
from proxy.http1 import HEAD_END, RequestHead
from proxy.joining import joined_answer
from proxy.openai_api import ROUTES, parse_call
from proxy.prompt_facts import cached_tokens_of, prompt_tokens_of, with_cached_tokens
from proxy.strict_head import check_head
from tests.unit.proxy.client import COMPLETIONS, Client, ask, fields_of, request_bytes
from tests.unit.proxy.conftest import Start

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WORDS = (
    *b"GET|POST| |/v1/completions|/health|HTTP/1.1|HTTP/1.0|Host: a|Content-Length: 3|:|,|0|5|a|{}".split(b"|"),
    b"Content-Length: ",
    *b"Transfer-Encoding: chunked|Connection: close|Authorization: Bearer k|Expect: 100-continue".split(b"|"),
    *(b"\r\n", b"\n", b"\r", b"\t", b"\x00", b"\xff", b"\r\n\r\n"),
)  # fmt: skip
EVENTS = (
    *(b"data: ", b"data: [DONE]\n\n", b"\n\n", b"\r\n\r\n", b"\n", b": comment", b"event: error\n", b"\x00", b"\xff"),
    *b'{|}|{"error":|{"choices":[|{"choices": []}|"usage":{|null|]|"|"stop_reason":"recomputed"|1e999'.split(b"|"),
    *(b'{"index":0,"text":"a","finish_reason":null}', b"5\r\n", b"0\r\n\r\n", b"zz\r\n"),
)  # fmt: skip
_NAMES = """prompt messages input model stream n max_tokens max_completion_tokens echo logprobs kv_transfer_params
    choices usage prompt_tokens_details cached_tokens error code type message index text delta finish_reason vllm_xargs
    content role remote_host remote_port bootstrap_room engine_id stop seed best_of id"""
KEYS = st.sampled_from(_NAMES.split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=5),
    max_leaves=15,
)
HEADS = st.lists(st.sampled_from(WORDS) | st.binary(max_size=3), max_size=30).map(b"".join)
STREAMS = st.lists(st.sampled_from(EVENTS) | st.binary(max_size=3), max_size=30).map(b"".join)
ANSWERS = STREAMS | JSON.map(lambda value: json.dumps(value).encode())


def cut(data: bytes, seed: int) -> list[bytes]:
    places = sorted(random.Random(seed).choices(range(len(data) + 1), k=4))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]


@FUZZ
@given(HEADS | HEADS.map(lambda rest: b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + rest), st.integers(0, 9))
def test_a_head_is_refused_or_means_one_thing(raw: bytes, seed: int) -> None:
    raw = raw.partition(HEAD_END)[0] + HEAD_END
    head = RequestHead()
    try:
        for piece in cut(raw, seed):
            head.feed(piece)
        check_head(raw, 100)
    except (BadHead, AssertionError):  # the latter: fed on after its end, which the frontend refuses
        return
    if not head.complete:
        return
    again = RequestHead()
    rebuilt = rebuilt_head(head, raw, "id")
    again.feed(rebuilt)
    check_head(rebuilt, 110)
    same = ("method", "target", "version", "chunked", "content_length", "authorization")
    assert again.complete and all(getattr(head, name) == getattr(again, name) for name in same)


@FUZZ
@given(STREAMS, st.integers(0, 9))
def test_a_chunked_body_is_the_same_however_it_is_cut(raw: bytes, seed: int) -> None:
    def read(pieces: list[bytes]) -> tuple[bytes, bool] | None:
        decoder, out = ChunkDecoder(), b""
        try:
            for piece in pieces:
                out += b"".join(decoder.feed(piece)[0])
        except BadHead:
            return None
        return out, decoder.complete

    assert read([raw]) == read(cut(raw, seed))


@FUZZ
@given(st.sampled_from(sorted(ROUTES.values())), ANSWERS)
def test_bodies_of_requests(route: str, body: bytes) -> None:
    try:
        call = parse_call(route, body)
    except BadRequest:
        return
    for make in CONTRACTS.values():
        contract = make()
        contract.takes_whole(call), contract.splits(call)


@FUZZ
@given(ANSWERS)
def test_answers_of_instances(body: bytes) -> None:
    def try_(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, NotExact, UpstreamFailure):  # what their callers turn into an instance's failure
            return None

    for make in CONTRACTS.values():
        found = try_(make().kv_of, body)
        assert found is None or type(found) is dict
        if make is CONTRACTS["pull"]:
            try_(cached_tokens_of, body, found)
    for function in (prompt_tokens_of, contract_of, kv_tokens_of, engines_of, delivered_in, sse.first_telling_event):
        try_(function, body)
    assert isinstance(try_(with_cached_tokens, body, 3) or b"", bytes)
    try_(joined_answer, [body, body], 1, "a", "b")
    for event in body.split(b"\n\n"):
        error = try_(sse.error_of, event)
        assert error is None or (type(error[0]) is int and type(error[1]) is bytes)


@FUZZ
@given(STREAMS, st.integers(0, 9), st.booleans(), st.booleans())
def test_streams_of_instances(raw: bytes, seed: int, chunked: bool, chunked_in: bool) -> None:
    """What the client gets is framed well whatever the decoder says."""
    sent: list[bytes] = []
    stream = ClientStream(sent.append, chunked=chunked, one_choice=True, max_kept_bytes=1000, max_event_bytes=200)
    stream.cached_tokens = 1
    pieces = cut(raw, seed) or [b""]
    sink = stream.begin(b"", pieces[0], chunked_in)
    for piece in pieces[1:]:
        sink(piece)
    with contextlib.suppress(NotExact):
        stream.delivered()
    if chunked and not chunked_in:
        ChunkDecoder().feed(b"".join(sent))


@FUZZ
@given(st.binary(max_size=40))
def test_paths(path: bytes) -> None:
    plain = plain_path(b"/" + path)
    assert plain.startswith(b"/") and not {b"", b".", b".."} & set(plain[1:].split(b"/")[:-1])


SEEDS = [
    request_bytes(COMPLETIONS, fields_of(COMPLETIONS)),
    request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True)),
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'17\r\n{"prompt":"a","n":null}\r\n0\r\nA: b\r\n\r\n',
    b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /instances/add HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
]


def mutated(chance: random.Random) -> bytes:
    raw = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(4)):
        at, how = chance.randrange(len(raw) + 1), chance.randrange(4)
        if how == 0:
            raw[at:at] = chance.choice(WORDS)
        elif how == 1:
            del raw[at : at + chance.randrange(1, 8)]
        elif how == 2 and at < len(raw):
            raw[at] = chance.randrange(256)
        else:
            raw[at:at] = raw[at : at + chance.randrange(40)]
    return bytes(raw) + (chance.choice(SEEDS) if chance.random() < 0.3 else b"")


@pytest.mark.parametrize("seed", range(4))
async def test_requests_over_a_socket(start: Start, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    """Mutated, pipelined, cut anywhere, left at any moment; then the proxy serves as before, and holds nothing."""
    setup = await start(request_read_timeout_s=5)
    chance = random.Random(seed)

    async def one() -> None:
        client = await Client.connect(setup.port)
        try:
            for piece in cut(mutated(chance), chance.randrange(1000)):
                client.writer.write(piece)
                await asyncio.sleep(0)
            if chance.random() < 0.7:
                async with asyncio.timeout(0.3):
                    came = await client.reader.read(65536)
                assert not came or came.startswith(b"HTTP/1.1 "), came[:100]
        except (ConnectionError, TimeoutError):
            pass
        finally:
            client.close()

    for _ in range(15):
        await asyncio.gather(*(one() for _ in range(12)))
    assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))).text == "t0 t1 t2 t3 "
    await setup.settled()
    for engine in setup.engines:
        engine.complaints.clear()  # what was passed on to them is no prefill, nor JSON
    ours = [record for record in caplog.records if "client_connected_cb" not in record.getMessage()]
    bugs = [record for record in ours if record.levelno >= logging.ERROR]
    assert not bugs, [record.getMessage() + str(record.exc_info) for record in bugs]

"""The story of a request over real sockets: the straight way, and every row of the retry table."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.kv_ledger import KvState
from tests.unit.proxy.client import CHAT, COMPLETIONS, Client, ask, fields_of
from tests.unit.proxy.conftest import Start
from tests.unit.proxy.stand_in import Act

TEXT = "t0 t1 t2 t3 "
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@PATHS
@STREAM
async def test_the_straight_way(start: Start, path: str, stream: bool) -> None:
    setup = await start()
    fields = fields_of(path, stream=stream, unknown=[1])
    answer = await ask(setup.port, path, fields, X_Request_Id="r-1", Traceparent=TRACE)
    assert (answer.status, answer.text, answer.complete) == (200, TEXT, True)
    assert answer.headers["x-request-id"] == "r-1"
    prefill, decode = setup.p.requests[0], setup.d.requests[0]
    assert prefill.headers["x-request-id"] == decode.headers["x-request-id"] == "r-1"
    assert prefill.headers["traceparent"] == decode.headers["traceparent"] == answer.headers["traceparent"] == TRACE
    assert decode.headers["host"] == f"127.0.0.1:{setup.d.port}"
    assert decode.kv == {
        "do_remote_prefill": True, "remote_request_id": "r-1", "remote_port": setup.p.port, "lease": 1,
        "baton": {"version": 1, "token": "secret"},
    }  # fmt: skip
    assert {**decode.fields, "kv_transfer_params": None} == {**fields, "kv_transfer_params": None}
    assert prefill.fields["unknown"] == [1]
    await setup.settled()
    assert setup.app.kv_ledger.totals[KvState.CONSUMED] == 1


async def test_connections_are_kept_and_used_again(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    for _ in range(5):
        assert (await client.post(COMPLETIONS, fields_of(COMPLETIONS))).text == TEXT
        assert (await client.post(CHAT, fields_of(CHAT, stream=True))).text == TEXT
    client.close()
    assert len(setup.p.connections) <= 2 and len(setup.d.connections) <= 2


async def test_the_key_of_the_environment_is_sent_unless_the_client_has_one(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    setup = await start()
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS), Authorization="Bearer own")
    assert [one.headers["authorization"] for one in setup.p.requests] == ["Bearer sk-env", "Bearer own"]
    assert [one.headers["authorization"] for one in setup.d.requests] == ["Bearer sk-env", "Bearer own"]


async def test_kv_params_of_a_client_are_refused(start: Start) -> None:
    setup = await start()
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, kv_transfer_params={"do_remote_prefill": True}))
    assert (answer.status, answer.error["param"]) == (400, "kv_transfer_params")
    assert not setup.p.requests and not setup.d.requests


async def test_kv_params_of_a_client_can_be_allowed(start: Start) -> None:
    setup = await start(allow_client_kv_transfer_params=True)
    own = {"do_remote_prefill": True, "x": 1}
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, kv_transfer_params=own))
    assert answer.text == TEXT and setup.d.requests[0].kv == own and not setup.p.requests


async def test_a_list_of_prompts_beyond_the_limit_goes_to_a_decoder_alone(start: Start) -> None:
    setup = await start(max_children=2)
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, prompt=["a", "b", "c"]))
    assert answer.status == 200 and not setup.p.requests and setup.d.requests[0].kv is None
    assert setup.app.metrics.recomputes == {"too_many_children": 1}


async def test_without_kv_the_decoder_computes_the_prompt_and_it_is_counted(start: Start) -> None:
    setup = await start()
    setup.p.script = ["no_kv"]
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    assert answer.text == TEXT and setup.d.requests[0].kv is None
    assert setup.app.metrics.recomputes == {"prefiller_gave_no_kv": 1}


async def test_a_stream_of_unusual_framing(start: Start) -> None:
    setup = await start()
    for act in ("close_delimited", "interim", "json_for_stream"):
        setup.d.script = [act]
        answer = await ask(setup.port, CHAT, fields_of(CHAT, stream=True))
        assert (answer.status, answer.text) == (200, TEXT), act


@STREAM
async def test_a_client_of_http_1_0_gets_it_unchunked(start: Start, stream: bool) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    answer = await client.post(COMPLETIONS, fields_of(COMPLETIONS, stream=stream), version="1.0")
    assert "transfer-encoding" not in answer.headers and answer.text == TEXT
    assert await client.closed_by_peer()
    client.close()


# --- failures. What is expected: status, num of prefills, num of decodes, KV given back

OTHER = [
    # leg, act, status, prefills, decodes, reclaimed
    ("prefill", "reset", 200, 2, 1, 0),
    ("prefill", "garbage", 200, 2, 1, 0),
    ("prefill", "status:500", 200, 2, 1, 0),
    ("prefill", "status:503", 200, 2, 1, 0),
    ("prefill", "hang", 200, 2, 1, 0),
    ("prefill", "status:400", 400, 1, 0, 0),
    ("prefill", "status:404", 404, 1, 0, 0),
    ("prefill", "status:429", 429, 1, 0, 0),
    ("decode", "reset", 200, 2, 2, 1),
    ("decode", "garbage", 200, 2, 2, 1),
    ("decode", "status:500", 200, 2, 2, 1),
    ("decode", "status:503", 200, 2, 2, 1),
    ("decode", "hang", 200, 2, 2, 1),
    ("decode", "status:400", 400, 1, 1, 1),
    ("decode", "status:422", 422, 1, 1, 1),
]


@STREAM
@pytest.mark.parametrize(("leg", "act", "status", "prefills", "decodes", "reclaimed"), OTHER)
@pytest.mark.parametrize("num", [1, 2], ids=["alone", "another_there"])
async def test_a_failure_before_the_first_event(
    start: Start, leg: str, act: Act, status: int, prefills: int, decodes: int, reclaimed: int, stream: bool, num: int
) -> None:
    limit_s = 1.0 if act == "hang" else 10.0  # of a leg that does not hang, on a busy machine too
    setup = await start(num, num, prefill_timeout_s=limit_s, first_token_timeout_s=limit_s)
    failing = setup.prefillers if leg == "prefill" else setup.decoders
    failing[0].script = [act]
    for engine in failing[1:]:  # the first to be asked is the first in order
        assert not engine.script
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, stream=stream))
    assert answer.status == status, answer.body
    if status == 200:
        assert answer.text == TEXT
    else:
        assert answer.error["message"] == f"engine says {status}"
    assert sum(len(one.requests) for one in setup.prefillers) == prefills
    assert sum(len(one.requests) for one in setup.decoders) == decodes
    if num == 2 and status == 200:
        assert len(failing[1].requests) == 1  # not the one that failed
    await setup.settled()
    assert setup.app.kv_ledger.totals[KvState.RECLAIMED] == reclaimed
    assert sum(len(one.released) for one in setup.decoders) == reclaimed


@STREAM
@pytest.mark.parametrize("act", ["reset", "garbage", "status:500", "hang"])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_when_attempts_run_out(start: Start, leg: str, act: str, stream: bool) -> None:
    name = "prefill_timeout_s" if leg == "prefill" else "first_token_timeout_s"
    setup = await start(max_retries=2, **{name: 0.2 if act == "hang" else 10.0})
    engine = setup.p if leg == "prefill" else setup.d
    engine.script = [act] * 9
    answer = await ask(setup.port, CHAT, fields_of(CHAT, stream=stream))
    assert answer.status == {"reset": 502, "garbage": 502, "status:500": 500, "hang": 504}[act]
    assert answer.error["message"]
    assert len(engine.requests) == 2
    await setup.settled()
    totals = setup.app.kv_ledger.totals
    assert totals[KvState.RECLAIMED] == totals[KvState.HELD] == (0 if leg == "prefill" else 2)


@STREAM
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_refused_connection_goes_to_another(start: Start, leg: str, stream: bool) -> None:
    setup = await start(2, 2)
    engines = setup.prefillers if leg == "prefill" else setup.decoders
    await engines[0].stop()
    for _ in range(4):
        answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, stream=stream))
        assert (answer.status, answer.text) == (200, TEXT)
    assert sum(len(one.requests) for one in setup.prefillers) == 4  # a refused decoder costs no second prefill
    assert setup.app.kv_ledger.totals[KvState.CONSUMED] == 4


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_nobody_there_is_503_and_when_to_come_back(start: Start, leg: str) -> None:
    setup = await start(reclaim_timeout_s=0.3)
    await (setup.p if leg == "prefill" else setup.d).stop()
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert leg in answer.error["message"]
    await setup.settled()
    assert setup.app.kv_ledger.totals[KvState.ORPHANED] == (0 if leg == "prefill" else 1)


async def test_kv_is_given_back_once_a_decoder_is_back(start: Start) -> None:
    setup = await start()
    await setup.d.stop()
    assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS), X_Request_Id="late")).status == 503
    await setup.d.start()
    await setup.settled()
    assert setup.d.released == ["late"]


@pytest.mark.parametrize("act", ["error_event", "role_then_error"])
async def test_an_error_as_first_event_is_a_failure_of_the_decoder(start: Start, act: str) -> None:
    setup = await start(1, 2)
    setup.d.script = [act]
    answer = await ask(setup.port, CHAT, fields_of(CHAT, stream=True))
    assert (answer.status, answer.text) == (200, TEXT)
    assert len(setup.p.requests) == 2


async def test_an_error_as_first_event_keeps_its_status(start: Start) -> None:
    setup = await start(max_retries=1)
    setup.d.script = ["error_event"]
    answer = await ask(setup.port, CHAT, fields_of(CHAT, stream=True))
    assert (answer.status, answer.error["type"]) == (503, "kv_load_error")
    await setup.settled()


@pytest.mark.parametrize("act", ["mid_reset", "mid_cut"])
async def test_a_stream_that_may_not_be_continued_ends_in_an_error_event(start: Start, act: str) -> None:
    """Half an event is held back, so that another fits behind what the client has."""
    setup = await start(max_continuations=0)
    setup.d.script = [act]
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, stream=True))
    assert (answer.status, answer.complete, answer.text) == (200, True, "t0 t1 ")
    last = answer.body.decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 502
    assert b"[DONE]" not in answer.body


async def test_a_whole_answer_lost_in_the_middle_is_tried_again(start: Start) -> None:
    setup = await start()
    setup.d.script = ["mid_cut"]
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    assert (answer.status, answer.text) == (200, TEXT)


async def test_silence_in_a_stream_ends_it(start: Start) -> None:
    setup = await start(between_tokens_timeout_s=0.3, max_continuations=0)
    setup.d.gate = asyncio.Event()
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, stream=True))
    assert answer.text == "t0 " and b'"error"' in answer.body


async def test_stock_kv_is_not_sent_twice(start: Start) -> None:
    """A stock engine takes a second dispatch for a reader of blocks that may be freed: left to its time-out."""
    setup = await start(stock=True, max_retries=1)
    setup.d.script = ["status:500"]
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    await setup.settled()
    assert setup.app.kv_ledger.totals[KvState.ORPHANED] == 1
    assert len(setup.d.requests) == 1 and not setup.d.released


async def test_a_repeated_prefill_has_an_id_of_its_own(start: Start) -> None:
    setup = await start()
    setup.d.script = ["status:500"]
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS), X_Request_Id="mine")
    ids = [one.headers["x-request-id"] for one in [*setup.p.requests, *setup.d.requests]]
    assert ids == ["mine", "mine-2", "mine", "mine-2"] and answer.headers["x-request-id"] == "mine"


async def test_an_engine_that_restarted_costs_nobody_an_error(start: Start) -> None:
    setup = await start()
    for _ in range(3):
        assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200
        for engine in setup.engines:
            await engine.stop()
            await engine.start()


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_reused_connection_that_dies_is_not_the_instances_fault(start: Start, leg: str) -> None:
    setup = await start()
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    engine = setup.p if leg == "prefill" else setup.d
    engine.script = ["reset"]  # on the connection that is kept
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    assert (answer.status, answer.text) == (200, TEXT)
    key = (leg, "stale", "same_instance" if leg == "prefill" else "prefill_again")
    assert setup.app.metrics.retries == {key: 1}
    assert all(one.health.healthy for one in setup.app.fleet.all)


async def test_load_is_spread(start: Start) -> None:
    setup = await start(2, 3)
    await asyncio.gather(*[ask(setup.port, CHAT, fields_of(CHAT, stream=True)) for _ in range(36)])
    assert all(10 <= len(one.requests) <= 26 for one in setup.prefillers)
    assert all(6 <= len(one.requests) <= 18 for one in setup.decoders)

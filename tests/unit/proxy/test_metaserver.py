"""The metaserver by itself: who is answered, when a prefill starts, what callers are told of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.callers import Callers
from proxy.config import ProxyConfig
from proxy.control_http import openai_errors
from proxy.instance import Fleet
from proxy.metaserver import PATH, Metaserver


class Prefill:
    """What the metaserver starts; `fail` is raised by the next one."""

    def __init__(self) -> None:
        self.posted: list[dict[str, dict[str, Any]]] = []
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: Exception | None = None

    async def __call__(self, posted: dict[str, dict[str, Any]]) -> None:
        self.posted.append(posted)
        self.began.set()
        await self.gate.wait()
        failure, self.fail = self.fail, None
        if failure is not None:
            raise failure


class Caller:
    def __init__(self, metaserver: Metaserver, session: aiohttp.ClientSession, url: str) -> None:
        self.metaserver = metaserver
        self._session = session
        self._url = url

    async def post(self, body: Any) -> tuple[int, Any]:
        async with self._session.post(self._url, json=body) as answer:
            return answer.status, await answer.json()


@pytest.fixture
async def caller() -> AsyncIterator[Caller]:
    loop = asyncio.get_running_loop()
    callers = Callers(("127.0.0.1",), Fleet(ProxyConfig(), loop))
    metaserver = Metaserver(0.3, callers, loop, Counter())
    app = web.Application(middlewares=[openai_errors])
    app.add_routes(metaserver.routes())
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}{PATH}"
    async with aiohttp.ClientSession() as session:
        yield Caller(metaserver, session, url)
    await runner.cleanup()


async def test_an_id_nobody_issued_is_404(caller: Caller) -> None:
    status, answer = await caller.post({"request_id": "chatcmpl-guess"})
    assert status == 404 and answer["error"]["type"] == "not_found_error"
    with caller.metaserver.expect(("chatcmpl-R",), Prefill()):
        pass
    assert (await caller.post({"request_id": "chatcmpl-R"}))[0] == 404
    assert caller.metaserver.num_expected == 0


@pytest.mark.parametrize("body", [[], {}, {"request_id": 5}])
async def test_a_call_without_an_id_is_400(caller: Caller, body: Any) -> None:
    assert (await caller.post(body))[0] == 400


async def test_a_call_starts_the_prefill_and_is_told_of_its_end(caller: Caller) -> None:
    prefill = Prefill()
    with caller.metaserver.expect(("chatcmpl-R",), prefill):
        params = {"request_id": "chatcmpl-R", "remote_host": "d"}
        assert await caller.post(params) == (200, {"status": "ok"})
    assert prefill.posted == [{"chatcmpl-R": params}]


async def test_all_children_are_waited_for_and_prefilled_once(caller: Caller) -> None:
    prefill = Prefill()
    prefill.gate.clear()
    ids = tuple(f"cmpl-R-{i}" for i in range(3))
    with caller.metaserver.expect(ids, prefill):
        calls = [asyncio.ensure_future(caller.post({"request_id": one})) for one in reversed(ids[1:])]
        done, _ = await asyncio.wait(calls, timeout=0.1)
        assert not done and not prefill.posted
        calls.append(asyncio.ensure_future(caller.post({"request_id": ids[0]})))
        await prefill.began.wait()
        prefill.gate.set()
        assert [status for status, _ in await asyncio.gather(*calls)] == [200, 200, 200]
    assert [list(one) for one in prefill.posted] == [list(ids)]


async def test_more_children_than_a_decoder_has_threads_do_not_wait_for_one_another(caller: Caller) -> None:
    """A decoder posts from 32 threads: answered only when all have called, the 33rd child would never call."""
    prefill = Prefill()
    threads = asyncio.Semaphore(32)

    async def post(one: str) -> int:
        async with threads:
            return (await caller.post({"request_id": one}))[0]

    ids = tuple(f"cmpl-R-{i}" for i in range(40))
    with caller.metaserver.expect(ids, prefill):
        assert set(await asyncio.gather(*map(post, ids))) == {200}
        assert len(prefill.posted) == 1


async def test_a_slow_prefill_does_not_hold_the_caller(caller: Caller) -> None:
    prefill = Prefill()
    prefill.gate.clear()
    with caller.metaserver.expect(("chatcmpl-R",), prefill) as handoff:
        assert (await caller.post({"request_id": "chatcmpl-R"}))[0] == 200
        assert handoff.prefill is not None and not handoff.prefill.done()
        prefill.gate.set()
        await handoff.prefill


async def test_a_failure_is_502_to_every_caller_and_the_next_call_starts_again(caller: Caller) -> None:
    prefill = Prefill()
    prefill.fail = ConnectionError("no prefiller")
    ids = ("cmpl-R-0", "cmpl-R-1")
    with caller.metaserver.expect(ids, prefill) as handoff:
        answers = await asyncio.gather(*(caller.post({"request_id": one}) for one in ids))
        assert [status for status, _ in answers] == [502, 502]
        assert "no prefiller" in answers[0][1]["error"]["message"]
        assert isinstance(handoff.failed.result(), ConnectionError)
        assert (await caller.post({"request_id": ids[1]}))[0] == 200
        assert len(prefill.posted) == 2


async def test_a_caller_that_leaves_does_not_end_the_prefill(caller: Caller) -> None:
    prefill = Prefill()
    prefill.gate.clear()
    with caller.metaserver.expect(("chatcmpl-R",), prefill) as handoff:
        calling = asyncio.ensure_future(caller.post({"request_id": "chatcmpl-R"}))
        await prefill.began.wait()
        calling.cancel()
        await asyncio.sleep(0.05)
        assert handoff.prefill is not None and not handoff.prefill.done()
        prefill.gate.set()
        await handoff.prefill

"""A client that leaves, at every point of the story: nothing stays reserved, handed out, or connected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proxy.drain import wait_until
from proxy.kv_ledger import KvState
from proxy.upstream import UpstreamConnection
from tests.unit.proxy.client import COMPLETIONS, Client, fields_of, request_bytes
from tests.unit.proxy.conftest import Setup, Start
from tests.unit.proxy.stand_in import Engine, Request

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


async def leave_when(setup: Setup, reached: Callable[[], bool], *, stream: bool) -> None:
    """Send a request, and close the connection hard as soon as `reached()`."""
    client = await Client.connect(setup.port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=stream)))
    assert await wait_until(reached, 3)
    client.close()


@STREAM
async def test_in_prefill_an_engine_that_aborts(start: Start, stream: bool) -> None:
    setup = await start()
    setup.p.gate = asyncio.Event()
    await leave_when(setup, lambda: bool(setup.p.requests), stream=stream)
    await setup.settled(1.0)
    assert setup.p.hung_up == 1 and not setup.d.requests
    assert setup.app.kv_ledger.totals[KvState.HELD] == 0


@STREAM
async def test_in_prefill_an_engine_that_answers_all_the_same(start: Start, stream: bool) -> None:
    """Its KV is handed out to nobody: it has to be given back."""
    setup = await start()
    left = asyncio.Event()

    async def answer_after_all(engine: Engine, writer: asyncio.StreamWriter, request: Request) -> None:
        await left.wait()
        await engine.prefill(writer, request, "ok")

    setup.p.script = [answer_after_all]
    setup.p.keep_open = True
    client = await Client.connect(setup.port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=stream), X_Request_Id="gone"))
    assert await wait_until(lambda: bool(setup.p.requests), 3)
    client.close()
    assert await wait_until(lambda: not setup.app.num_in_flight(), 3)
    left.set()
    assert await wait_until(lambda: setup.d.released == ["gone"], 3)
    await setup.settled(1.0)
    assert setup.app.kv_ledger.totals[KvState.RECLAIMED] == 1 and not setup.d.requests


async def test_in_prefill_in_the_very_moment_its_answer_comes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is read after the cancellation, and before the coroutine gets to know of it."""
    setup = await start()
    client = await Client.connect(setup.port)
    gather = UpstreamConnection._gather

    def leave_first(self: UpstreamConnection, data: bytes) -> None:
        if b"kv_transfer_params" in data:
            next(iter(setup.app.connections)).connection_lost(None)
        gather(self, data)

    monkeypatch.setattr(UpstreamConnection, "_gather", leave_first)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS), X_Request_Id="moment"))
    assert await wait_until(lambda: setup.d.released == ["moment"], 3)
    client.close()
    await setup.settled(2.0)
    assert setup.app.kv_ledger.totals[KvState.RECLAIMED] == 1 and not setup.d.requests


@STREAM
async def test_in_decode_before_the_first_event(start: Start, stream: bool) -> None:
    setup = await start()
    setup.d.script = ["hang"]
    await leave_when(setup, lambda: bool(setup.d.requests), stream=stream)
    await setup.settled(2.0)
    assert setup.d.hung_up == 1
    assert len(setup.d.released) == 1 and setup.app.kv_ledger.totals[KvState.RECLAIMED] == 1


async def test_in_decode_before_the_first_event_of_a_stock_engine(start: Start) -> None:
    setup = await start(stock=True)
    setup.d.script = ["hang"]
    await leave_when(setup, lambda: bool(setup.d.requests), stream=True)
    await setup.settled(2.0)
    assert not setup.d.released and len(setup.d.requests) == 1
    assert setup.app.kv_ledger.totals[KvState.ORPHANED] == 1


async def test_in_the_middle_of_a_stream(start: Start) -> None:
    setup = await start()
    setup.d.gate = asyncio.Event()
    client = await Client.connect(setup.port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True)))
    assert (await client.head())[0] == 200
    client.close()
    await setup.settled(2.0)
    assert setup.d.hung_up == 1 and not setup.d.released
    assert setup.app.kv_ledger.totals[KvState.CONSUMED] == 1


async def test_while_a_retry_waits(start: Start) -> None:
    setup = await start(retry_delay=10)
    setup.p.script = ["status:500"]
    await leave_when(setup, lambda: bool(setup.app.metrics.retries), stream=False)
    await setup.settled(1.0)


async def test_while_connecting(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = await start()
    pool = setup.app.fleet.all[0].pool
    connecting = asyncio.Event()

    async def never() -> None:
        connecting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(pool, "connect", never)
    pool.close(idle_only=True)
    await leave_when(setup, connecting.is_set, stream=False)
    await setup.settled(1.0)


async def test_with_a_request_half_sent(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS))[:-5])
    await client.writer.drain()
    client.close()
    await setup.settled(1.0)
    assert not setup.p.requests


@STREAM
async def test_at_any_moment(start: Start, stream: bool) -> None:
    """Many clients, each cut a little later than the one before, so that every await of the story is hit."""
    setup = await start(2, 2)

    async def one(delay_s: float) -> None:
        client = await Client.connect(setup.port)
        client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=stream)))
        await asyncio.sleep(delay_s)
        client.close()

    await asyncio.gather(*[one(i * 0.0005) for i in range(100)])
    await setup.settled(5.0)
    totals = setup.app.kv_ledger.totals
    assert totals[KvState.ORPHANED] == 0
    assert totals[KvState.HELD] == totals[KvState.CONSUMED] + totals[KvState.RECLAIMED]
    handed_out = sum(engine.num_leases for engine in setup.prefillers)
    assert totals[KvState.HELD] <= handed_out

from __future__ import annotations

import asyncio
import threading

import pytest

from engine_adapter.torch_engine.choice import Choice, Prompt
from engine_adapter.torch_engine.detokenizer import ByteTextDecoder, Detokenizer
from engine_adapter.torch_engine.output_router import OutputRouter
from engine_adapter.torch_engine.sequence import RequestOutput


def choice(name: str) -> Choice:
    return Choice(0, Prompt([1]), name, Detokenizer(ByteTextDecoder(lambda _: b"")))


def outputs(*names: str) -> list[RequestOutput]:
    return [RequestOutput(name, [1]) for name in names]


async def test_a_step_is_one_hand_over_and_one_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    router = OutputRouter(loop)
    first = router.open([choice("a"), choice("b")])
    second = router.open([choice("c")])
    calls = []
    real = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (calls.append(call), real(*call))[1])
    engine = threading.Thread(target=router.on_outputs, args=(outputs("a", "b", "c", "gone"),))
    engine.start()
    assert [got.engine_request_id for got, _ in await first.next()] == ["a", "b"]
    assert [got.engine_request_id for got, _ in await second.next()] == ["c"]
    engine.join()
    assert len(calls) == 1


async def test_what_comes_while_nobody_waits_is_kept_in_order() -> None:
    router = OutputRouter(asyncio.get_running_loop())
    a = choice("a")
    subscription = router.open([a])
    for _ in range(3):
        router.on_outputs(outputs("a"))
    await asyncio.sleep(0)
    assert len(await subscription.next()) == 3
    router.close([a])
    assert router.num_open == 0
    router.on_outputs(outputs("a"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(subscription.next(), 0.02)


async def test_a_failure_comes_after_what_came_before() -> None:
    router = OutputRouter(asyncio.get_running_loop())
    subscription = router.open([choice("a")])
    router.on_outputs(outputs("a"))
    await asyncio.sleep(0)
    router.fail_all(ValueError("dead"))
    assert len(await subscription.next()) == 1
    with pytest.raises(ValueError, match="dead"):
        await subscription.next()


async def test_a_cancelled_wait_loses_nothing() -> None:
    router = OutputRouter(asyncio.get_running_loop())
    subscription = router.open([choice("a")])
    waiting = asyncio.create_task(subscription.next())
    await asyncio.sleep(0)
    waiting.cancel()
    router.on_outputs(outputs("a"))
    await asyncio.sleep(0)
    assert len(await subscription.next()) == 1


def test_outputs_after_the_loop_has_closed_are_nobodys() -> None:
    loop = asyncio.new_event_loop()
    router = OutputRouter(loop)
    loop.close()
    router.on_outputs(outputs("a"))

"""Policies over real sockets: what they are told of a request, and that what they hold is given back, whatever ends it.

The `start` fixture fails if anything is left in `load.policy_load` at the end.
"""

from __future__ import annotations

import asyncio

import pytest

from proxy.drain import wait_until
from proxy.scheduling import POLICIES
from proxy.scheduling.ascend import prefill_millionths
from tests.unit.proxy.client import CHAT, COMPLETIONS, Client, ask, fields_of, request_bytes
from tests.unit.proxy.conftest import Setup, Start


def held(setup: Setup) -> tuple[int, int]:
    """By the policies on all prefillers, and on all decoders."""
    by_role = [[one.load.policy_load for one in members] for members in setup.app.fleet.members.values()]
    return sum(by_role[0]), sum(by_role[1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_every_policy_serves(start: Start, policy: str, stream: bool) -> None:
    setup = await start(2, 3, policy=policy)
    for path in (COMPLETIONS, CHAT) * 3:
        answer = await ask(setup.port, path, fields_of(path, stream=stream, user="u"))
        assert answer.status == 200 and answer.complete
    await setup.settled()


async def test_ascend_holds_the_prefiller_until_the_first_event_and_the_decoder_until_the_end(start: Start) -> None:
    setup = await start(policy="ascend")
    setup.p.gate, setup.d.gate = asyncio.Event(), asyncio.Event()
    request = request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True))
    body_bytes = len(request.partition(b"\r\n\r\n")[2])
    client = await Client.connect(setup.port)
    client.writer.write(request)
    assert await wait_until(lambda: bool(setup.p.requests), 5)
    assert held(setup) == (prefill_millionths(body_bytes), body_bytes)
    setup.p.gate.set()
    assert await wait_until(lambda: held(setup)[0] == 0, 5)
    assert held(setup) == (0, body_bytes) and len(setup.d.requests) == 1
    setup.d.gate.set()
    assert (await client.answer()).complete
    await setup.settled()
    client.close()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_leaves_nothing_held(start: Start, phase: str) -> None:
    setup = await start(policy="ascend")
    engine = setup.p if phase == "prefill" else setup.d
    engine.gate = asyncio.Event()
    client = await Client.connect(setup.port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True)))
    assert await wait_until(lambda: bool(engine.requests), 5)
    assert held(setup) != (0, 0)
    client.close()
    await setup.settled()
    assert held(setup) == (0, 0)


async def test_a_failed_leg_gives_back_what_was_held_for_it(start: Start) -> None:
    setup = await start(2, 2, policy="ascend")
    for engine in (setup.p, setup.d):
        await engine.stop()  # the first in order, so the first that is picked
    answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    assert answer.status == 200
    await setup.settled()
    assert held(setup) == (0, 0)


async def test_a_session_stays_with_its_decoder(start: Start) -> None:
    setup = await start(1, 4, prefill_policy="round_robin", decode_policy="session")
    client = await Client.connect(setup.port)
    for name in ("a", "b", "c", "d", "e"):
        before = [len(one.requests) for one in setup.decoders]
        for _ in range(4):
            assert (await client.post(COMPLETIONS, fields_of(COMPLETIONS), X_Session_ID=name)).status == 200
        grown = [len(one.requests) - count for one, count in zip(setup.decoders, before, strict=True)]
        assert sorted(grown) == [0, 0, 0, 4], name
    assert sum(bool(one.requests) for one in setup.decoders) > 1
    client.close()


async def test_a_prompt_that_goes_on_returns_to_its_prefiller(start: Start) -> None:
    setup = await start(3, 1, prefill_policy="prefix_affinity")
    prompts = [letter * 200_000 for letter in "abc"]
    gate = asyncio.Event()
    for one in setup.prefillers:
        one.gate = gate
    first = [asyncio.create_task(ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, prompt=one))) for one in prompts]
    assert await wait_until(lambda: all(one.requests for one in setup.prefillers), 5)
    gate.set()
    assert [(await one).status for one in first] == [200] * 3
    for turn in (1, 2):
        for prompt in prompts:
            answer = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, prompt=prompt + "more " * turn))
            assert answer.status == 200
    for one in setup.prefillers:
        assert len(one.requests) == 3
        assert len({request.fields["prompt"][0] for request in one.requests}) == 1

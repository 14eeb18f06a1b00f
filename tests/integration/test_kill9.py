"""kill -9 of any part under load: what it carried ends in an error or a retry in time, nothing else notices."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.integration.deployment import Command, Deployment, metric
from tests.integration.greedy import Answer, Prompt, ask, prompts

BOUND_S = 5.0
"""Of what a dead part carried, until it has ended."""
USED_AGAIN_S = 10.0
SLOWEST_TIMES = 5
"""On a machine so busy that a request takes seconds, bounds are this many times the slowest that nothing befell."""
NUM_CLIENTS = 6
CALM_S = 1.5
"""Load before the kill (again and again until each client has had an answer), and from the kill to the restart."""
MOST_CALMS = 20
TEST_LIMIT_S = 900
"""Of a test: processes take their time to start on a busy machine. What is bounded is bounded by itself."""


@dataclass
class Outcome:
    prompt: int
    started: float
    ended: float
    answer: Answer | None
    error: str


Work = tuple[float, ...]

VICTIMS: dict[str, Callable[[Deployment], Command]] = {
    "prefill-sidecar": lambda split: split.prefillers[0].sidecar,
    "decode-sidecar": lambda split: split.decoders[0].sidecar,
    "prefill-engine": lambda split: split.prefillers[0].engine,
    "decode-engine": lambda split: split.decoders[0].engine,
}


@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("contract", ["pull", "layerwise"])
async def test_each_part_killed_in_turn_under_load(tiny_model: Path, contract: str) -> None:
    asked = prompts(40, seed=13)[20:]
    # A layerwise decoder that has a prompt in its cache asks no prefiller.
    engine_args = ["--no-enable-prefix-caching"] if contract == "layerwise" else []
    with Deployment(tiny_model, 2, 2, engine_args=engine_args, proxy_args=["--contract", contract]) as split:
        async with aiohttp.ClientSession() as session:
            expected = [await ask(session, split.url, prompt, stream=False) for prompt in asked]
            for name, victim in VICTIMS.items():
                slowest_s, before = await _kill_and_restart(split, session, victim(split), asked, expected, name)
                await _is_used_again(split, session, victim(split), slowest_s, before)
        assert await asyncio.to_thread(split.settles, max(BOUND_S, SLOWEST_TIMES * slowest_s)) == {}


LEASE_S = 3.0
SETTLE_S = 30.0
"""Generous, for a busy machine: what is tested is that nothing stays, and KV for no longer than its lease."""


@pytest.mark.timeout(TEST_LIMIT_S)
async def test_the_proxy_killed_under_load_leaves_nothing_behind(tiny_model: Path) -> None:
    """What it had in hand ends: streams with their connections, KV that no decoder came for with its lease. The next
    one at the same port serves at once, and knows the fleet without being told."""
    asked = prompts(40, seed=17)[20:]
    lease = ["--kv-lease-s", str(LEASE_S)]
    with Deployment(tiny_model, num_prefill=2, num_decode=2, engine_args=lease) as split:
        async with aiohttp.ClientSession() as session:
            expected = [await ask(session, split.url, prompt, stream=False) for prompt in asked]
            for kill in (_kill_the_proxy, _kill_the_proxy_between_the_legs):
                await kill(split, session, asked)
                left = await asyncio.to_thread(split.settles, LEASE_S + SETTLE_S)
                assert left == {}, "left on the engines by a dead proxy"
                split.proxy.start()
                await asyncio.to_thread(split.proxy.wait_ready)
                answers = await asyncio.gather(*(ask(session, split.url, prompt, stream=True) for prompt in asked[:6]))
                assert answers == expected[:6]
                await _are_counted(split.url, 6)
        assert split.settles(within_s=SETTLE_S) == {}


async def _are_counted(url: str, num_ok: int) -> None:
    """An answer is counted when it has left, which its client may be told of first."""
    deadline = time.monotonic() + SETTLE_S
    while metric(url, "pd_proxy_requests_total", outcome="ok") != num_ok:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def _kill_the_proxy(split: Deployment, session: aiohttp.ClientSession, asked: list[Prompt]) -> None:
    outcomes: list[Outcome] = []
    stop = asyncio.Event()
    clients = [
        asyncio.create_task(_client(split.url, session, asked, index, outcomes, stop)) for index in range(NUM_CLIENTS)
    ]
    await asyncio.sleep(CALM_S)
    stop.set()
    split.proxy.kill9()
    killed = time.monotonic()
    await asyncio.wait_for(asyncio.gather(*clients), SETTLE_S)
    assert [one for one in outcomes if one.error and one.started <= killed <= one.ended], "nothing was in flight"


async def _kill_the_proxy_between_the_legs(
    split: Deployment, session: aiohttp.ClientSession, asked: list[Prompt]
) -> None:
    """KV is handed out, and who would have told a decoder of it dies: its lease is all that frees it."""
    for decoder in split.decoders:
        decoder.engine.signal(signal.SIGSTOP)
    try:
        request = asyncio.create_task(ask(session, split.url, asked[0], stream=False))
        sidecars = [prefiller.sidecar_url for prefiller in split.prefillers]
        deadline = time.monotonic() + SETTLE_S
        while not sum(metric(url, "baton_sidecar_leases", state="offered") for url in sidecars):
            assert time.monotonic() < deadline, "no KV was handed out"
            await asyncio.sleep(0.05)
        split.proxy.kill9()
        with pytest.raises(aiohttp.ClientError):
            await request
    finally:
        for decoder in split.decoders:
            decoder.engine.signal(signal.SIGCONT)


async def _kill_and_restart(
    split: Deployment,
    session: aiohttp.ClientSession,
    victim: Command,
    asked: list[Prompt],
    expected: list[Answer],
    name: str,
) -> tuple[float, Work]:
    """Returns the seconds of the slowest request that had ended before the kill, and what the victim had done when it
    was back."""
    outcomes: list[Outcome] = []
    stop = asyncio.Event()
    clients = [
        asyncio.create_task(_client(split.url, session, asked, index, outcomes, stop)) for index in range(NUM_CLIENTS)
    ]
    for _ in range(MOST_CALMS):
        await asyncio.sleep(CALM_S)
        if len(outcomes) >= NUM_CLIENTS:
            break
    victim.kill9()
    killed = time.monotonic()
    slowest_s = max(outcome.ended - outcome.started for outcome in outcomes)
    bound_s = max(BOUND_S, SLOWEST_TIMES * slowest_s)
    await asyncio.sleep(CALM_S)
    victim.start()
    await asyncio.to_thread(victim.wait_ready)
    before = await asyncio.to_thread(_work_of, split, victim)
    await asyncio.sleep(CALM_S)
    stop.set()
    await asyncio.gather(*clients)
    for outcome in outcomes:
        if outcome.answer is not None:
            assert outcome.answer == expected[outcome.prompt], f"{name}: a wrong text"
            continue
        carried = outcome.started <= killed
        assert carried, f"{name}: a request that began {outcome.started - killed:.2f} s after the kill: {outcome.error}"
        assert outcome.ended - killed < bound_s, f"{name}: ended {outcome.ended - killed:.1f} s after the kill"
    in_flight = [o for o in outcomes if o.started <= killed < o.ended]
    assert in_flight, f"{name}: nothing was in flight"
    last_s = max(o.ended - killed for o in in_flight)
    assert last_s < bound_s, f"{name}: ended {last_s:.1f} s after the kill; the slowest before took {slowest_s:.1f} s"
    return slowest_s, before


async def _client(
    url: str,
    session: aiohttp.ClientSession,
    asked: list[Prompt],
    index: int,
    outcomes: list[Outcome],
    stop: asyncio.Event,
) -> None:
    number = index
    while not stop.is_set():
        number += NUM_CLIENTS
        prompt = number % len(asked)
        started = time.monotonic()
        try:
            answer = await ask(session, url, asked[prompt], stream=bool(number % 2))
            outcomes.append(Outcome(prompt, started, time.monotonic(), answer, ""))
        except (AssertionError, aiohttp.ClientError) as error:
            outcomes.append(Outcome(prompt, started, time.monotonic(), None, repr(error)))


def _work_of(split: Deployment, victim: Command) -> Work:
    """Prompt tokens of the victim's engine and, of a decoder, blocks that came to it."""
    instance = next(i for i in split.instances if victim in (i.engine, i.sidecar))
    num_tokens = metric(instance.url, "vllm:prompt_tokens_total")
    if instance.role == "prefill":
        return (num_tokens,)
    return num_tokens, metric(instance.sidecar_url, "baton_sidecar_pull_blocks_total")


async def _is_used_again(
    split: Deployment,
    session: aiohttp.ClientSession,
    victim: Command,
    slowest_s: float,
    before: Work,
) -> None:
    """The restarted part has carried requests since it is back, with nobody having told the proxy. What it did for the
    clients of the kill counts: cold, it may be slow at that, and then the policy prefers the other for a while."""
    deadline = time.monotonic() + max(USED_AGAIN_S, SLOWEST_TIMES * slowest_s)
    seed = 100
    while any(now <= then for now, then in zip(_work_of(split, victim), before, strict=True)):
        assert time.monotonic() < deadline, f"{victim.name} gets no requests after its restart"
        seed += 1
        fresh = prompts(28, seed)[20:]  # in no cache
        await asyncio.gather(*(ask(session, split.url, prompt, stream=False) for prompt in fresh))

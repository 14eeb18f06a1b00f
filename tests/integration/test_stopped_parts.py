"""SIGSTOP of any part under load: a process that hangs is found out, its requests go elsewhere, no text is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest

from engine_adapter.sidecar_link import FENCE_GRACE_S
from sidecar.client import CALL_TIMEOUT_S
from tests.integration.deployment import Command, Deployment
from tests.integration.greedy import Answer, Prompt, ask, prompts
from tests.integration.test_kill9 import NUM_CLIENTS, VICTIMS, Outcome, _client

HEALTH_INTERVAL_S, HEALTH_TIMEOUT_S, HEALTH_MAX_FAILURES = 0.5, 1.0, 2
PULL_TIMEOUT_S = 2.0
LEASE_S = 10.0
FOUND_OUT_S = {
    "engine": HEALTH_MAX_FAILURES * (HEALTH_INTERVAL_S + HEALTH_TIMEOUT_S),  # by the proxy's probes
    "sidecar": max(PULL_TIMEOUT_S + FENCE_GRACE_S, CALL_TIMEOUT_S),  # by its engine, which kills it
}
SLACK_S = 15.0
"""For a busy machine, and the request's second attempt."""
CALM_S = 1.0


@pytest.mark.timeout(240)
async def test_each_part_stopped_in_turn_under_load(tiny_model: Path) -> None:
    asked = prompts(40, seed=29)[20:]
    engine_args = ["--kv-pull-timeout-s", str(PULL_TIMEOUT_S), "--kv-lease-s", str(LEASE_S)]
    proxy_args = [
        "--health-interval-s", str(HEALTH_INTERVAL_S), "--health-timeout-s", str(HEALTH_TIMEOUT_S),
        "--health-max-failures", str(HEALTH_MAX_FAILURES),
    ]  # fmt: skip
    with Deployment(tiny_model, 2, 2, engine_args=engine_args, proxy_args=proxy_args) as split:
        async with aiohttp.ClientSession() as session:
            expected = [await ask(session, split.url, prompt, stream=False) for prompt in asked]
            for name, victim in VICTIMS.items():
                bound_s = FOUND_OUT_S[name.rpartition("-")[2]] + SLACK_S
                await _stop_and_resume(split, session, victim(split), asked, expected, name, bound_s)
        # What a stopped prefiller hands out after it goes on, to nobody, is held for its lease.
        assert split.settles(within_s=LEASE_S + 10.0) == {}


async def _stop_and_resume(
    split: Deployment,
    session: aiohttp.ClientSession,
    victim: Command,
    asked: list[Prompt],
    expected: list[Answer],
    name: str,
    bound_s: float,
) -> None:
    outcomes: list[Outcome] = []
    stop = asyncio.Event()
    clients = [
        asyncio.create_task(_client(split.url, session, asked, index, outcomes, stop)) for index in range(NUM_CLIENTS)
    ]
    await asyncio.sleep(CALM_S)
    assert victim.process is not None
    victim.process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    hold_s = bound_s if name.endswith("sidecar") else FOUND_OUT_S["engine"] + CALM_S
    with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(victim.process.wait, hold_s)
    if name.endswith("sidecar"):
        assert victim.process.poll() == -signal.SIGKILL, f"{name}: its engine lets it hang"
        victim.start()
    else:
        victim.process.send_signal(signal.SIGCONT)
    resumed = time.monotonic()
    await asyncio.to_thread(victim.wait_ready)
    await asyncio.sleep(CALM_S)
    stop.set()
    await asyncio.gather(*clients)
    slowest = max(outcome.ended - outcome.started for outcome in outcomes)
    errors = [outcome.error for outcome in outcomes if outcome.answer is None]
    print(f"{name}: {len(outcomes)} requests, {errors=}, slowest {slowest:.1f} s, stopped {resumed - stopped:.1f} s")
    assert all(outcome.answer == expected[outcome.prompt] for outcome in outcomes if outcome.answer is not None)
    assert not errors, f"{name}: {errors[:3]}"
    assert slowest < bound_s, f"{name}: a request took {slowest:.1f} s"

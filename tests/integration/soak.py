"""Two prefillers and two decoders under mixed load, one part of them killed or stopped every so often, for a long time.

    python -m tests.integration.soak --minutes 30          (make soak)

Every request ends with the right tokens or in a clean error, in time; at least 99 in 100 are right; in the end nothing
is held anywhere, and no process has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from tests.integration.deployment import Deployment, is_up, make_model
from tests.integration.greedy import Answer, Prompt, ask, prompts

NUM_CLIENTS = 4
NUM_PROMPTS = 24
SHARE_OF_LEAVERS = 0.1
REQUEST_TIMEOUT_S = 60.0
DOWN_S = 2.0
STOPPED_S = 4.0
"""A part that is stopped for less than the time after which its engine kills it; then it goes on."""
LEASE_S = 10.0
MIN_RIGHT = 0.99
MAX_GROWTH = 1.3
MAX_GROWTH_BYTES = 24 << 20
MAX_WARM_UP_S = 120.0
"""What a process has after this under load is what it may have; a quarter of a short run."""


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    memory: list[str] = field(default_factory=list)

    @property
    def share_right(self) -> float:
        judged = self.counts["right"] + self.counts["error"] + self.counts["wrong"]
        return self.counts["right"] / judged if judged else 0.0


async def client(
    url: str, number: int, asked: list[Prompt], expected: list[Answer], tally: Tally, stop: asyncio.Event
) -> None:
    chance = random.Random(number)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while not stop.is_set():
            which, began = chance.randrange(len(asked)), time.monotonic()
            asking = asyncio.create_task(ask(session, url, asked[which], stream=chance.random() < 0.5))
            if chance.random() < SHARE_OF_LEAVERS:
                await asyncio.sleep(chance.uniform(0.0, 0.3))
                asking.cancel()
            try:
                right = await asking == expected[which]
                tally.counts["right" if right else "wrong"] += 1
                if not right:
                    tally.wrong.append(f"another text for prompt {which}")
            except asyncio.CancelledError:
                tally.counts["left"] += 1
            except AssertionError:  # a status, or an error event: the client knows where it stands
                tally.counts["error"] += 1
            except (TimeoutError, aiohttp.ClientError, ValueError, IndexError) as error:
                tally.counts["wrong"] += 1
                tally.wrong.append(f"no clean end: {error!r}")
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)


async def faults(split: Deployment, every_s: float, tally: Tally, stop: asyncio.Event, seed: int) -> None:
    """kill -9 and restart, or SIGSTOP and SIGCONT, of an engine or a sidecar, one at a time."""
    chance = random.Random(seed)
    victims = [part for one in split.instances for part in (one.engine, one.sidecar)]
    while not await stopped_within(stop, every_s):
        victim, kill = chance.choice(victims), chance.random() < 0.7
        tally.faults["killed" if kill else "stopped"] += 1
        if kill:
            victim.kill9()
            await asyncio.sleep(DOWN_S)
        else:
            assert victim.process is not None
            victim.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            victim.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.5)
        for part in victims:
            if part.process is not None and part.process.poll() is not None:  # killed here, or as hung by its engine
                part.start()
                await asyncio.to_thread(part.wait_ready)


async def stopped_within(stop: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True


def resident(pid: int) -> int:
    """Bytes of its own: the pools that it has mapped belong to the engines, and come and go with them."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)


async def watch(split: Deployment, tally: Tally, stop: asyncio.Event, seconds: float) -> dict[str, tuple[int, int]]:
    """Bytes of each process, by name: once it had served for a while, and last. A restarted one begins anew."""
    seen: dict[tuple[str, int], tuple[int, int]] = {}
    serves_since: dict[tuple[str, int], float] = {}
    until, shown = time.monotonic() + seconds, 0.0
    warm_up_s = min(MAX_WARM_UP_S, seconds / 4)
    while time.monotonic() < until:
        await asyncio.sleep(2.0)
        for command in split.commands:
            process = command.process
            if process is None or process.poll() is not None:
                continue
            key = (command.name, process.pid)
            if key not in serves_since:
                if await asyncio.to_thread(is_up, command.ready_url):
                    serves_since[key] = time.monotonic()
            elif time.monotonic() - serves_since[key] > warm_up_s:
                now = resident(process.pid)
                seen[key] = (seen.get(key, (now, 0))[0], now)
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"{until - shown:6.0f} s to go  {dict(tally.counts)}  {dict(tally.faults)}", flush=True)
    stop.set()
    return {f"{name}[{pid}]": bytes_ for (name, pid), bytes_ in seen.items()}


async def soak(model: Path, seconds: float, every_s: float, seed: int) -> tuple[Tally, list[str]]:
    """What happened, and what was not as it has to be."""
    tally, stop = Tally(), asyncio.Event()
    asked = prompts(NUM_PROMPTS, seed=seed)
    with Deployment(model, 2, 2, engine_args=["--kv-lease-s", str(LEASE_S)]) as split:
        async with aiohttp.ClientSession() as session:
            expected = [await ask(session, split.url, prompt, stream=False) for prompt in asked]
        clients = [
            asyncio.create_task(client(split.url, number, asked, expected, tally, stop))
            for number in range(NUM_CLIENTS)
        ]
        breaking = asyncio.create_task(faults(split, every_s, tally, stop, seed))
        memory = await watch(split, tally, stop, seconds)
        await asyncio.gather(*clients, breaking)
        found = list(tally.wrong[:10])
        if left := await asyncio.to_thread(split.settles, LEASE_S + 10):
            found.append(f"left over: {left}")
        tally.memory = [f"{name}: {warm >> 20} to {last >> 20} MiB" for name, (warm, last) in memory.items()]
        for name, (warm, last) in memory.items():
            if last > MAX_GROWTH * warm and last - warm > MAX_GROWTH_BYTES:
                found.append(f"{name} grew from {warm >> 20} to {last >> 20} MiB")
    if tally.share_right < MIN_RIGHT:
        found.append(f"only {tally.share_right:.2%} right")
    return tally, found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.integration.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-soak-") as folder:
        model = make_model(Path(folder) / "tiny")
        tally, found = asyncio.run(soak(model, options.minutes * 60, options.every, options.seed))
    print(f"{dict(tally.counts)} {dict(tally.faults)}: {tally.share_right:.2%} right, slowest {tally.slowest_s:.1f} s")
    for line in found:
        print("FAILED", line)
    print("\n".join(tally.memory))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

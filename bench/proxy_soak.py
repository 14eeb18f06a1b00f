"""Hours in minutes: mixed load with clients that leave, held at a share of one core; memory and descriptors stay flat.

    python -m bench.proxy_soak --minutes 10 --share 0.5 --check

Whole and streamed answers are compared with what the mock engines must have said; some clients leave before the answer,
in the middle of it, or in the middle of their own request. In the end nothing may be open in the proxy, and no KV held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson
import psutil
import uvloop

from bench.load_generator import LoadCase, expected_body, request_fields
from bench.proxy_overhead import NUM_DECODE, NUM_PREFILL, cores
from bench.proxy_processes import HOST, Proxy, engines, free_port, pd_proxy_command, proxy

NUM_CLIENTS = 64
WHOLE, STREAMED = LoadCase("whole", 1, 1, 16, stream=False), LoadCase("streamed", 1, 1, 64, stream=True)
LEAVES = ("before_the_answer", "in_the_answer", "in_the_request")
SHARE_OF_LEAVERS = 0.2
SAMPLE_S = 5.0
WARM_UP_SHARE = 0.3  # of the time: pools, caches and the allocator's arenas fill
MAX_GROWTH_MIB = 8.0
ANSWER_TIMEOUT_S = 30.0
SETTLE_S = 15.0
OPEN_LOAD = ("num_requests", "num_tokens", "kv_tokens")  # of an instance's load, what must be zero when all have gone


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    pause_s: float = 0.05

    def wrong(self, what: str) -> None:
        self.counts["wrong"] += 1
        if len(self.errors) < 10:
            self.errors.append(what)


@dataclass(frozen=True)
class Sample:
    at_s: float
    share: float
    rss_mib: float
    num_descriptors: int
    num_threads: int


async def client(port: int, number: int, tally: Tally, until: float) -> None:
    """One client after the other on one connection, which those who leave take with them."""
    chance = random.Random(number)
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    count = 0
    while time.monotonic() < until:
        count += 1
        try:
            if reader is None or writer is None:
                reader, writer = await asyncio.open_connection(HOST, port)
            case = STREAMED if chance.random() < 0.5 else WHOLE
            fields = request_fields(case, f"{number}-{count}")
            if chance.random() < SHARE_OF_LEAVERS:
                await leave(chance.choice(LEAVES), reader, writer, fields, tally)
                reader = writer = None
            else:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await ask(reader, writer, case, fields, tally)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            tally.wrong(f"{type(error).__name__}: {error}")
            reader = writer = None
        await asyncio.sleep(tally.pause_s * chance.uniform(0.5, 1.5))
    if writer is not None:
        writer.close()


def request_of(fields: dict[str, Any]) -> bytes:
    body = orjson.dumps(fields)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: LoadCase, fields: dict[str, Any], tally: Tally
) -> None:
    writer.write(request_of(fields))
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    if b"transfer-encoding: chunked" in lines:
        body = b"".join([piece async for piece in chunks(reader)])
    else:
        length = next(line for line in lines if line.startswith(b"content-length:"))
        body = await reader.readexactly(int(length.partition(b":")[2]))
    if not head.startswith(b"HTTP/1.1 200 ") or body != expected_body(case, fields, body):
        tally.wrong(f"{head[:40]!r} {body[-200:]!r}")
    tally.counts[case.name] += 1


async def chunks(reader: asyncio.StreamReader) -> Any:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


async def leave(
    when: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: dict[str, Any], tally: Tally
) -> None:
    request = request_of(fields)
    writer.write(request[: len(request) // 2] if when == "in_the_request" else request)
    await writer.drain()
    if when == "in_the_answer":
        await reader.read(300)
    writer.transport.abort()
    tally.counts[f"left_{when}"] += 1


async def watch(target: Proxy, tally: Tally, share: float, started: float, until: float) -> list[Sample]:
    """Samples of the proxy; holds its CPU at `share` of a core by the clients' pauses."""
    samples = []
    process = psutil.Process(target.pid)
    while time.monotonic() < until:
        before, began = target.cpu_s(), time.monotonic()
        await asyncio.sleep(SAMPLE_S)
        used = (target.cpu_s() - before) / (time.monotonic() - began)
        tally.pause_s = min(5.0, max(0.0005, tally.pause_s * min(2.0, max(0.5, used / share))))
        samples.append(
            Sample(
                time.monotonic() - started, used, target.rss_bytes() / 2**20, process.num_fds(), process.num_threads()
            )
        )
        if len(samples) % 6 == 1:
            one = samples[-1]
            print(
                f"{one.at_s:6.0f} s  {one.share:5.0%} of a core  {one.rss_mib:6.1f} MiB  {one.num_descriptors:4} fds  "
                f"{sum(tally.counts.values())} requests",
                flush=True,
            )
    return samples


async def soak(target: Proxy, seconds: float, share: float) -> tuple[Tally, list[Sample]]:
    tally, started = Tally(), time.monotonic()
    until = started + seconds
    clients = [asyncio.create_task(client(target.port, number, tally, until)) for number in range(NUM_CLIENTS)]
    samples = await watch(target, tally, share, started, until)
    await asyncio.gather(*clients)
    return tally, samples


def get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=10) as answer:
        return json.load(answer)


def left_open(port: int) -> str:
    """What the proxy still holds when everybody has gone; "" if nothing."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        shown = get(port, "/instances")["instances"]
        held = [
            {"address": one["address"], **{name: one["load"][name] for name in OPEN_LOAD}, "kv_held": one["kv_held"]}
            for one in shown
            if one["kv_held"] or any(one["load"][name] for name in OPEN_LOAD)
        ]
        in_flight = get(port, "/healthcheck").get("request_num")
        if not held and not in_flight:
            return ""
        if time.monotonic() > deadline:
            return f"{in_flight} requests in flight, held: {held}"
        time.sleep(0.2)


def verdict(tally: Tally, samples: list[Sample], left: str) -> list[str]:
    """What was not as it has to be."""
    found = [f"wrong answer: {error}" for error in tally.errors]
    if left:
        found.append(f"left open: {left}")
    warm = [one for one in samples if one.at_s > samples[-1].at_s * WARM_UP_SHARE]
    third = max(1, len(warm) // 3)
    begin, end = warm[:third], warm[-third:]
    growth = min(one.rss_mib for one in end) - max(one.rss_mib for one in begin)
    if growth > MAX_GROWTH_MIB:
        found.append(f"memory grew by {growth:.1f} MiB after the warm-up, the limit is {MAX_GROWTH_MIB}")
    if min(one.num_descriptors for one in end) > max(one.num_descriptors for one in begin):
        found.append("descriptors grew after the warm-up")
    if min(one.num_threads for one in end) > max(one.num_threads for one in begin):
        found.append("threads grew after the warm-up")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.proxy_soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.5, help="of one core, for the proxy (%(default)s)")
    parser.add_argument("--proxy-flags", default="", help="more flags for pd-proxy, in one string")
    parser.add_argument("--check", action="store_true", help="exit 1 if anything was wrong, leaked or grew")
    options = parser.parse_args()
    bench_core, proxy_core = cores()
    if bench_core is not None:
        os.sched_setaffinity(0, {bench_core})
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(engines(NUM_PREFILL, NUM_DECODE, bench_core, "--no-record"))
        port = free_port()
        command = pd_proxy_command(
            os.path.join(os.path.dirname(sys.executable), "pd-proxy"), port, served, *options.proxy_flags.split()
        )
        target = stack.enter_context(proxy("pd-proxy", command, port, proxy_core))
        tally, samples = uvloop.run(soak(target, options.minutes * 60, options.share))
        found = verdict(tally, samples, left_open(port))
    shares = sorted(one.share for one in samples)
    print(" ".join(f"{name}={count}" for name, count in sorted(tally.counts.items())))
    print(f"median share of a core {shares[len(shares) // 2]:.0%}, RSS at the end {samples[-1].rss_mib:.1f} MiB")
    for line in found:
        print("FAILED", line)
    return 1 if found and options.check else 0


if __name__ == "__main__":
    sys.exit(main())

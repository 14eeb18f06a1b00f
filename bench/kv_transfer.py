"""How fast blocks move from one engine's pool to another's, beside a plain memory copy of the same blocks.

    python -m bench.kv_transfer [--transport shm|tcp|mooncake] [--order random|contiguous|both] [--rounds N] [--check]

Two real pd-sidecar processes on loopback and two pools in this process. A transfer is timed from `client.pull()` to
the PullEnded that `client.poll()` returns; the plain copy is one memmove a block between the same two pools, in the
same round, one thread, in both orders. In random order the blocks are a random choice on both sides, so hardly any
are neighbours; in contiguous order they are one run, which a transfer joins and the plain copy does not.

With --transport tcp the comparisons are plain sockets (one connection, 1 MiB calls, from one process to another) and
Mooncake's own TCP, where it is installed, in the same rounds. With --transport mooncake it is Mooncake called directly,
with the same spans and whichever way of calling it was fastest. `--check` ends with status 1 if, at 8 MiB or more, shm
is below 0.85 of the plain copy, tcp below 0.7 of plain sockets or 3 times Mooncake's TCP at 16 KiB blocks, or mooncake
below 0.9 of Mooncake itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.plain_mooncake import SETTINGS, plain_mooncake
from bench.plain_sockets import plain_sockets
from sidecar.client import SidecarClient
from sidecar.layout import KvLayout, Plane
from sidecar.protocol import Offer, OfferEnded, PullEnded, PullSource, pack_block_ids
from sidecar.spans import plan_spans

MIB = 1 << 20
POOL_BYTES = 256 * MIB
SHAPES = [
    (16 << 10, MIB), (16 << 10, 8 * MIB), (16 << 10, 64 * MIB), (64 << 10, 8 * MIB), (64 << 10, 64 * MIB),
    (256 << 10, 8 * MIB), (256 << 10, 64 * MIB), (MIB, 8 * MIB), (MIB, 64 * MIB),
]  # fmt: skip
"""(bytes a block, bytes a transfer)."""
SETTLE_S = 0.5
"""After the first contact, in which the consumer's engine faults the producer's pool in."""
BAR = 0.85
TCP_BAR = 0.7
MOONCAKE_BAR = 3.0
MOONCAKE_BAR_BLOCK = 16 << 10
OWN_MOONCAKE_BAR = 0.9


class Engine:
    """One end: a pool and the client of its sidecar."""

    def __init__(self, socket_path: str, block_bytes: int, layout: KvLayout | None = None) -> None:
        num_blocks = POOL_BYTES // block_bytes
        if layout is None:
            plane = Plane(0, block_bytes, block_bytes)
            layout = KvLayout(num_blocks, 16, (plane,), 8, 2, 64, "float32", "bench", "block,layer,kv,token,head")
        self.num_blocks = num_blocks
        self.layout = layout
        self.fd = os.memfd_create("bench-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, POOL_BYTES)
        self._map = mmap.mmap(self.fd, POOL_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._view = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._view)
        self._happened = threading.Event()
        self.client = SidecarClient.connect(socket_path, on_event=self._happened.set)
        self.client.register_pool(self.fd, layout, address=self.address)

    def wait(self, kind: type[OfferEnded] | type[PullEnded]) -> OfferEnded | PullEnded:
        while True:
            for event in self.client.poll():
                assert isinstance(event, kind), event
                return event
            if not self._happened.wait(30):
                raise SystemExit("a transfer did not end within 30 s")
            self._happened.clear()

    def close(self) -> None:
        self.client.close()
        del self._view
        self._map.close()
        os.close(self.fd)


@contextlib.contextmanager
def sidecar(directory: Path, name: str, transport: str) -> Iterator[str]:
    """A pd-sidecar process; yields its engine socket."""
    path = str(directory / name)
    command = [sys.executable, "-m", "sidecar.cli", "--socket", path, "--engine-id", name, "--transport", transport]
    process = subprocess.Popen([*command, "--log-level", "WARNING"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not process.stdout.readline().startswith("ready"):
            raise SystemExit(f"pd-sidecar {name} did not start")
        yield path
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def source(producer: Engine, offer: Offer, block_ids: list[int]) -> PullSource:
    """What a decoder's engine makes of the `kv_transfer_params` that it is sent."""
    hello = producer.client.hello
    return PullSource(
        hello.host, hello.port, hello.engine_id, offer.transfer_id, offer.token, offer.epoch, len(block_ids),
        pack_block_ids(block_ids),
    )  # fmt: skip


def transfer(producer: Engine, consumer: Engine, remote: list[int], local: list[int], name: str) -> tuple[float, float]:
    """Seconds of the offer, and from pull to PullEnded."""
    started = time.perf_counter()
    offer = producer.client.offer(name, remote, 16 * len(remote), 60)
    offered = time.perf_counter()
    consumer.client.pull(name, source(producer, offer, remote), local)
    ended = consumer.wait(PullEnded)
    took = time.perf_counter() - offered
    if not isinstance(ended, PullEnded) or not ended.ok:
        raise SystemExit(f"a transfer failed: {ended}")
    producer.wait(OfferEnded)
    return offered - started, took


def plain_copy(producer: Engine, consumer: Engine, remote: list[int], local: list[int], block_bytes: int) -> float:
    moves = [
        (consumer.address + to * block_bytes, producer.address + start * block_bytes)
        for start, to in zip(remote, local, strict=True)
    ]
    memmove = ctypes.memmove
    started = time.perf_counter()
    for to, start in moves:
        memmove(to, start, block_bytes)
    return time.perf_counter() - started


def choose(order: str, pool_blocks: int, num_blocks: int) -> list[int]:
    """Block ids of one side."""
    if order == "random":
        return random.sample(range(pool_blocks), num_blocks)
    first = random.randrange(pool_blocks - num_blocks + 1)
    return list(range(first, first + num_blocks))


def measure_shape(directory: Path, transport: str, order: str, block_bytes: int, num_bytes: int, rounds: int) -> float:
    """Print one line; the ratio of the medians."""
    with sidecar(directory, "producer", transport) as p, sidecar(directory, "consumer", transport) as c:
        producer, consumer = Engine(p, block_bytes), Engine(c, block_bytes)
        ctypes.memset(producer.address, 7, POOL_BYTES)
        copies, transfers = [], []
        num_blocks = num_bytes // block_bytes
        for number in range(rounds + 2):
            if number == 2:
                time.sleep(SETTLE_S)
            remote = choose(order, producer.num_blocks, num_blocks)
            local = choose(order, consumer.num_blocks, num_blocks)
            copy_s = plain_copy(producer, consumer, remote, local, block_bytes)
            _, transfer_s = transfer(producer, consumer, remote, local, f"round-{number}")
            if number >= 2:
                copies.append(copy_s)
                transfers.append(transfer_s)
        producer.close()
        consumer.close()
    copy_s, transfer_s = statistics.median(copies), statistics.median(transfers)
    ratio = copy_s / transfer_s
    print(
        f"{block_bytes // 1024:>6} KiB x {num_blocks:<5} {num_bytes // MIB:>4} MiB {order:<10}  "
        f"copy {num_bytes / copy_s / 2**30:6.2f} GiB/s   transfer {num_bytes / transfer_s / 2**30:6.2f} GiB/s "
        f"({transfer_s * 1e3:7.2f} ms)   ratio {ratio:5.2f}",
        flush=True,
    )
    return ratio


@contextlib.contextmanager
def pair(directory: Path, transport: str, block_bytes: int) -> Iterator[tuple[Engine, Engine]]:
    with (
        sidecar(directory, f"producer-{transport}", transport) as p,
        sidecar(directory, f"consumer-{transport}", transport) as c,
    ):
        ends = Engine(p, block_bytes), Engine(c, block_bytes)
        ctypes.memset(ends[0].address, 7, POOL_BYTES)
        try:
            yield ends
        finally:
            for end in ends:
                end.close()


def measure_tcp(directory: Path, order: str, block_bytes: int, num_bytes: int, rounds: int) -> tuple[float, float]:
    """Print one line; tcp's ratio to plain sockets, and to Mooncake's TCP (infinite where that is not installed)."""
    kinds = ["tcp", *(["mooncake"] if importlib.util.find_spec("mooncake") else [])]
    num_blocks = num_bytes // block_bytes
    times: dict[str, list[float]] = {kind: [] for kind in ("sockets", *kinds)}
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(plain_sockets())
        pairs = {kind: stack.enter_context(pair(directory, kind, block_bytes)) for kind in kinds}
        for number in range(rounds + 2):
            took = {"sockets": raw(num_bytes)}
            for kind, (producer, consumer) in pairs.items():
                remote = choose(order, producer.num_blocks, num_blocks)
                local = choose(order, consumer.num_blocks, num_blocks)
                took[kind] = transfer(producer, consumer, remote, local, f"round-{number}")[1]
            if number >= 2:
                for kind, seconds in took.items():
                    times[kind].append(seconds)
    medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    rates = "   ".join(f"{kind} {num_bytes / seconds / 2**30:5.2f} GiB/s" for kind, seconds in medians.items())
    to_sockets = medians["sockets"] / medians["tcp"]
    to_mooncake = medians.get("mooncake", float("inf")) / medians["tcp"]
    print(
        f"{block_bytes // 1024:>6} KiB x {num_blocks:<5} {num_bytes // MIB:>4} MiB {order:<10}  {rates}   "
        f"tcp to sockets {to_sockets:.2f}, to mooncake {to_mooncake:.2f}",
        flush=True,
    )
    return to_sockets, to_mooncake


def measure_mooncake(directory: Path, order: str, block_bytes: int, num_bytes: int, rounds: int) -> float:
    """Print one line; the ratio to Mooncake called directly.

    Each way to call it has its rounds, one call and one transfer in each: of several calls in a row of the same spans
    the later ones find open windows and warm caches.
    """
    num_blocks = num_bytes // block_bytes
    direct: list[list[float]] = [[] for _ in SETTINGS]
    transfers: list[float] = []
    with plain_mooncake(POOL_BYTES) as plain, pair(directory, "mooncake", block_bytes) as (producer, consumer):
        for number in range((rounds + 1) * len(SETTINGS)):
            remote = choose(order, producer.num_blocks, num_blocks)
            local = choose(order, consumer.num_blocks, num_blocks)
            spans = plan_spans(producer.layout, remote, consumer.layout, local)
            setting = number % len(SETTINGS)
            direct_s = plain((spans.remote, spans.local, spans.lengths), setting)
            _, transfer_s = transfer(producer, consumer, remote, local, f"round-{number}")
            if number >= len(SETTINGS):
                direct[setting].append(direct_s)
                transfers.append(transfer_s)
    medians = [statistics.median(seconds) for seconds in direct]
    best_s, transfer_s = min(medians), statistics.median(transfers)
    how, num = SETTINGS[medians.index(best_s)]
    ratio = best_s / transfer_s
    print(
        f"{block_bytes // 1024:>6} KiB x {num_blocks:<5} {num_bytes // MIB:>4} MiB {order:<10}  "
        f"Mooncake itself ({how}, {num} a call) {num_bytes / best_s / 2**30:5.2f} GiB/s   "
        f"transfer {num_bytes / transfer_s / 2**30:5.2f} GiB/s ({transfer_s * 1e3:7.2f} ms)   ratio {ratio:5.2f}",
        flush=True,
    )
    return ratio


def measure_control(directory: Path, transport: str, rounds: int) -> None:
    """Print what a transfer costs beside its bytes: leases of no block at all."""
    with sidecar(directory, "producer", transport) as p, sidecar(directory, "consumer", transport) as c:
        producer, consumer = Engine(p, 64 << 10), Engine(c, 64 << 10)
        transfer(producer, consumer, [], [], "first contact")
        times = [transfer(producer, consumer, [], [], f"empty-{number}") for number in range(rounds)]
        producer.close()
        consumer.close()
    for name, seconds in (
        ("offer", [offer for offer, _ in times]),
        ("pull, claim, release, PullEnded", [pull for _, pull in times]),
        ("together", [offer + pull for offer, pull in times]),
    ):
        cuts = statistics.quantiles(seconds, n=100)
        print(f"control, {name}: p50 {cuts[49] * 1e6:.0f} us   p99 {cuts[98] * 1e6:.0f} us   ({rounds} rounds)")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--transport", choices=("shm", "tcp", "mooncake"), default="shm")
    arguments.add_argument("--order", choices=("random", "contiguous", "both"), default="both")
    arguments.add_argument("--rounds", type=int, default=30)
    arguments.add_argument("--check", action="store_true")
    chosen = arguments.parse_args()
    orders = ("random", "contiguous") if chosen.order == "both" else (chosen.order,)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, {chosen.transport}")
    low = []
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        directory = Path(name)
        measure_control(directory, chosen.transport, 20 * chosen.rounds)
        for order, (block_bytes, num_bytes) in itertools.product(orders, SHAPES):
            shape = (order, block_bytes, num_bytes)
            if chosen.transport == "tcp":
                to_sockets, to_mooncake = measure_tcp(directory, *shape, chosen.rounds)
                bad = to_sockets < TCP_BAR or (block_bytes == MOONCAKE_BAR_BLOCK and to_mooncake < MOONCAKE_BAR)
            elif chosen.transport == "mooncake":
                bad = measure_mooncake(directory, *shape, chosen.rounds) < OWN_MOONCAKE_BAR
            else:
                bad = measure_shape(directory, chosen.transport, *shape, chosen.rounds) < BAR
            if bad and num_bytes >= 8 * MIB:
                low.append(shape)
    if chosen.check and low:
        print(f"below the bar: {low}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

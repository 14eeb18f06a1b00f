"""How fast slices of heads move between engines of unequal tensor-parallel sizes, over shared memory.

    python -m bench.kv_reshard [--rounds N] [--check]

A rank of a decoder of 2, 4 or 8 ranks pulls its heads of 256 blocks of 16 tokens from a prefiller of one: 8 layers,
8 heads of 128 numbers of 2 bytes. In token-major blocks (vLLM-Ascend's) a piece is one token's slice of the heads.
Timed as in bench.kv_transfer, control messages included, beside a plain copy of as many bytes between the same pools in
the same round: one memmove for each layer of each block, on one thread. `--check` ends with status 1 if token-major
pieces of 512 bytes or more move at less than a quarter of the plain copy's speed (a memmove a piece: a tenth).
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.kv_transfer import Engine, sidecar, source
from sidecar.layout import KvLayout, Plane
from sidecar.protocol import OfferEnded, PullEnded

LAYERS, HEADS, TOKENS, HEAD_BYTES = 8, 8, 16, 256
NUM_BLOCKS, BLOCKS_A_PULL = 400, 256
BAR = 0.25
"""Of a plain copy."""
BAR_PIECE = 512


def layout(order: str, tp_size: int) -> KvLayout:
    """Rank 0's of so many, a plane a layer."""
    heads = HEADS // tp_size
    block = 2 * TOKENS * heads * HEAD_BYTES
    planes = tuple(Plane(layer * NUM_BLOCKS * block, block, block) for layer in range(LAYERS))
    return KvLayout(
        NUM_BLOCKS, TOKENS, planes, LAYERS, heads, HEAD_BYTES // 2, "bfloat16", "bench", order,
        tuple(order.split(",")), 0, tp_size, HEADS,
    )  # fmt: skip


def plain_copy(
    producer: Engine, consumer: Engine, remote: list[int], local: list[int], theirs: KvLayout, ours: KvLayout
) -> float:
    """Seconds to copy as many bytes as a pull moves."""
    moves = [
        (consumer.address + to.offset + to_block * to.stride_bytes,
         producer.address + start.offset + start_block * start.stride_bytes, to.block_bytes)
        for to, start in zip(ours.planes, theirs.planes, strict=True)
        for to_block, start_block in zip(local, remote, strict=True)
    ]  # fmt: skip
    memmove = ctypes.memmove
    started = time.perf_counter()
    for move in moves:
        memmove(*move)
    return time.perf_counter() - started


def measure(order: str, tp_size: int, rounds: int) -> bool:
    """Print one line; whether it is above the bar."""
    theirs, ours = layout(order, 1), layout(order, tp_size)
    times, copies = [], []
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as name,
        sidecar(Path(name), "p", "shm") as p,
        sidecar(Path(name), "d", "shm") as d,
    ):
        producer, consumer = Engine(p, theirs.block_bytes, theirs), Engine(d, ours.block_bytes, ours)
        for number in range(rounds + 2):
            remote, local = (random.sample(range(NUM_BLOCKS), BLOCKS_A_PULL) for _ in range(2))
            copies.append(plain_copy(producer, consumer, remote, local, theirs, ours))
            offer = producer.client.offer(str(number), remote, TOKENS * BLOCKS_A_PULL, 60)
            started = time.perf_counter()
            consumer.client.pull(str(number), source(producer, offer, remote), local)
            ended = consumer.wait(PullEnded)
            times.append(time.perf_counter() - started)
            if not isinstance(ended, PullEnded) or not ended.ok:
                raise SystemExit(f"a transfer failed: {ended}")
            producer.client.revoke(offer.transfer_id)  # of its readers only one is here
            producer.wait(OfferEnded)
        producer.close()
        consumer.close()
    took, num_bytes = statistics.median(times[2:]), BLOCKS_A_PULL * ours.block_bytes
    ratio = statistics.median(copy / pull for copy, pull in zip(copies[2:], times[2:], strict=True))
    rate = num_bytes / took / 2**30
    piece = HEADS // tp_size * HEAD_BYTES * (TOKENS if order.endswith("head,token") else 1)
    good = ratio >= BAR or piece < BAR_PIECE or not order.endswith("head")
    print(
        f"{order:<14} 1 to {tp_size} ranks, pieces of {piece:>6} bytes, {num_bytes >> 20:>3} MiB: "
        f"{rate:5.2f} GiB/s ({took * 1e3:6.2f} ms), {ratio:.2f} x plain copy"
        + ("" if good else f"  below the bar of {BAR:g}"),
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="end with status 1 below the bar")
    arguments = parser.parse_args()
    shapes = [(order, tp_size) for order in ("kv,token,head", "kv,head,token") for tp_size in (2, 4, 8)]
    results = [measure(order, tp_size, arguments.rounds) for order, tp_size in shapes]
    return 0 if all(results) or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())

"""How much of a KV transfer a layerwise push hides behind the prefill that computes it.

    python -m bench.layerwise_push [--transport shm|tcp|mooncake] [--layer-ms MS] [--rounds N] [--check]

Judged: real engines (bench.layerwise_engines). Two `pd-engine` processes with a sidecar each serve `make-model --size
small` (8 layers, float32) behind pd-proxy, one as the prefiller of the other: first the one that computes a prompt of
1,025 tokens in one chunk, then the one that does it in four (a chunk is computed in tiles of at most 128 tokens, and
each tile's layers are marked as they are written). Each prompt, never seen before, is sent in both contracts in turn,
and both must give the same tokens. Measured, on the one clock of the machine:

    pull   from the decoder's engine asking its sidecar for the KV until its engine thread knows that it is all there
    left   layerwise: from the return of the forward that computed the last of the KV until the same moment

Hidden is 1 - left / pull, 100 % where all is there before the forward returns. `--check` ends with status 1 if the
median of either is below 80 %. All processes share the machine's cores, as they would for a user of it.

Simulated, for information: two pd-sidecar processes and two pools in this process, a prefill stood for by sleeping
`--layer-ms` for each layer of each chunk, as on an accelerator. A layer is marked in the middle of its time, as by vLLM
between its attention and its MLP, or at its very end, as by no engine: there the last layer's share, one of eight,
can't be hidden at all. Exposed is the time from the end of the prefill to the PullEnded at the consumer's engine; the
pull beside it is of the same blocks, offered at the end of such a prefill.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench import layerwise_engines
from bench.kv_transfer import POOL_BYTES, Engine, sidecar, transfer
from sidecar.protocol import OfferEnded, PullEnded, PushTarget, Ready

MIB = 1 << 20
NUM_LAYERS = 8
"""Of bench.kv_transfer's pools."""
BLOCK_BYTES = 256 << 10
SHAPES = [(64 * MIB, 1), (64 * MIB, 4)]
"""(bytes a transfer, chunks of the prefill)."""
BAR = 0.8
IN_THE_MIDDLE, AT_THE_END = 0.5, 1.0
"""Of a layer's time: when it is marked."""


def push(
    producer: Engine, consumer: Engine, remote: list[int], local: list[int], name: str, chunks: int, layer_s: float,
    marked_at: float,
) -> float:  # fmt: skip
    """Seconds from the end of the prefill to the end of the push; `marked_at`: the share of a layer's time."""
    landing = consumer.client.land(name, local, deadline_s=60)
    assert landing is not None
    hello = consumer.client.hello
    target = PushTarget(hello.host, hello.port, hello.engine_id, landing.landing_id, landing.token, landing.epoch)
    offer = producer.client.push(name, remote, 16 * len(remote), 60, target, Ready())
    borders = [len(remote) * index // chunks for index in range(chunks + 1)]
    for start, end in itertools.pairwise(borders):
        for layer in range(NUM_LAYERS):
            time.sleep(layer_s * marked_at)
            marked = time.perf_counter()
            producer.client.mark_ready(offer.transfer_id, Ready(start, end, layer + 1))
            if marked_at < 1:
                time.sleep(layer_s * (1 - marked_at))
    computed = time.perf_counter() if marked_at < 1 else marked
    ended = consumer.wait(PullEnded)
    took = time.perf_counter() - computed
    if not isinstance(ended, PullEnded) or not ended.ok:
        raise SystemExit(f"a push failed: {ended}")
    producer.wait(OfferEnded)
    return took


def simulate(arguments: argparse.Namespace) -> None:
    """Print a line a shape."""
    rng = random.Random(1)
    layers = f"{NUM_LAYERS} layers of {arguments.layer_ms:g} ms a chunk"
    print(f"simulated, not judged: {layers}, {BLOCK_BYTES >> 10} KiB blocks")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with sidecar(path, "p", arguments.transport) as p, sidecar(path, "d", arguments.transport) as d:
            producer, consumer = Engine(p, BLOCK_BYTES), Engine(d, BLOCK_BYTES)
            try:
                for num_bytes, chunks in SHAPES:
                    one_shape(producer, consumer, rng, num_bytes, chunks, arguments)
            finally:
                producer.close()
                consumer.close()


def one_shape(
    producer: Engine, consumer: Engine, rng: random.Random, num_bytes: int, chunks: int, arguments: argparse.Namespace
) -> None:
    pulls: list[float] = []
    pushes: dict[float, list[float]] = {IN_THE_MIDDLE: [], AT_THE_END: []}
    layer_s = arguments.layer_ms / 1000
    for turn in range(arguments.rounds + 1):
        num = num_bytes // BLOCK_BYTES
        remote, local = (rng.sample(range(POOL_BYTES // BLOCK_BYTES), num) for _ in range(2))
        time.sleep(layer_s)
        offered_s, pulled_s = transfer(producer, consumer, remote, local, f"pull-{num_bytes}-{chunks}-{turn}")
        took = {}
        for marked_at in pushes:
            name = f"push-{num_bytes}-{chunks}-{turn}-{marked_at}"
            took[marked_at] = push(producer, consumer, remote, local, name, chunks, layer_s, marked_at)
        if turn:  # the first warms up
            pulls.append(offered_s + pulled_s)
            for marked_at, pushed_s in took.items():
                pushes[marked_at].append(pushed_s)
    exposed_ms = [statistics.median(times) * 1e3 for times in pushes.values()]
    hidden, at_the_end = (
        statistics.median(1 - push / pull for push, pull in zip(times, pulls, strict=True)) for times in pushes.values()
    )
    print(
        f"{num_bytes // MIB:4} MiB in {chunks} chunk{'s' * (chunks > 1)}: pull {statistics.median(pulls) * 1e3:6.2f} "
        f"ms; marked in the middle of a layer: exposed {exposed_ms[0]:5.2f} ms, hidden {hidden:.0%}; at its end: "
        f"{exposed_ms[1]:5.2f} ms, {at_the_end:.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--transport", choices=("shm", "tcp", "mooncake"), default="shm")
    parser.add_argument("--layer-ms", type=float, default=10.0, help="milliseconds a layer of one chunk is computed")
    parser.add_argument("--rounds", type=int, default=6, help="after one that warms up")
    parser.add_argument("--check", action="store_true", help="end with status 1 below the bar")
    arguments = parser.parse_args()
    print(f"engines, transport {arguments.transport}")
    good = layerwise_engines.measure(arguments.transport, arguments.rounds, BAR)
    simulate(arguments)
    sys.exit(0 if good or not arguments.check else 1)


if __name__ == "__main__":
    main()

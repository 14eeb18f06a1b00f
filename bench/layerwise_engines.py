"""How much of a KV transfer a layerwise push hides, between real engines. Part of bench.layerwise_push, which says how.

Two `pd-engine` processes (bench.traced_engine) with a sidecar each, of which one computes a prompt in one chunk and the
other in several. Each is in turn the prefiller, with the other as its decoder, behind a pd-proxy of each contract.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 1025
"""Of which an engine hands on the KV of all but the last: 64 blocks, 16 MiB in float32."""
CHUNKS = {1: 2048, 4: 256}
"""Chunks of that prompt, and the --max-num-batched-tokens that makes so many."""
WARM_UP_TOKENS = 257
NUM_TOKENS = 4
"""Of an answer."""
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Times:
    """Seconds of one prompt in both contracts."""

    pull: float
    pulled_after: float
    """The pull contract: from the end of the prefill's compute until the decoder has the KV, by way of the proxy."""
    left: float
    """Layerwise, likewise; below zero where it was there before."""
    left_after_mark: float
    """Layerwise: from the prefiller's last mark, which tells its sidecar that the last layer is written."""

    @property
    def hidden(self) -> float:
        return 1 - max(0.0, self.left) / self.pull


class Trace:
    """What the engines wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_read = 0
        path.touch()

    def take(self, *names: str) -> list[float]:
        """When each of these last happened since the last call, in seconds; waits until all have."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            text = self.path.read_text()[self._num_read :]
            happened = {name: int(at) * 1e-9 for name, at in (line.split() for line in text.splitlines())}
            if happened.keys() >= set(names) and text.endswith("\n"):
                self._num_read += len(text)
                if set(happened) != set(names):
                    raise SystemExit(f"expected {names} of a prompt, got {text.split()}")
                return [happened[name] for name in names]
            time.sleep(0.005)
        raise SystemExit(f"no {names} within {TIMEOUT_S:g} s: {text.split()}")


@contextlib.contextmanager
def served(*commands: list[str]) -> Iterator[list[str]]:
    """Start all of these at once; the HOST:PORT each of them listens at."""
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        addresses = []
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("ready"):
                raise SystemExit(f"{process.args!r} did not start: {line}")
            addresses.append(line.split("listen=")[1].split()[0])
        yield addresses
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
            if process.stdout is not None:
                process.stdout.close()


def engine(trace: Path, model: Path, transport: str, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "bench.traced_engine", str(trace), "serve", "--model", str(model),
        "--served-model-name", "m", "--port", "0", "--sidecar", "auto", "--sidecar-transport", transport,
        "--dtype", "float32", "--no-enable-prefix-caching", "--log-level", "WARNING", *flags,
    ]  # fmt: skip


def proxy(contract: str, prefiller: str, decoder: str) -> list[str]:
    command = [sys.executable, "-m", "proxy.cli", "--host", "127.0.0.1", "--port", "0", "--contract", contract]
    for role, address in (("prefiller", prefiller), ("decoder", decoder)):
        host, port = address.split(":")
        command += [f"--{role}-hosts", host, f"--{role}-ports", port]
    return [*command, "--max-connections", "16", "--log-level", "WARNING"]


def ask(address: str, prompt: list[int]) -> list[int]:
    body = {"model": "m", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    request = urllib.request.Request(f"http://{address}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    return token_ids


def one_prompt(trace: Trace, proxies: dict[str, str], prompt: list[int], push_first: bool) -> Times:
    """The same prompt in both contracts. Raises SystemExit where they answer differently."""
    answers: dict[str, list[int]] = {}
    for contract in ("layerwise", "pull") if push_first else ("pull", "layerwise"):
        answers[contract] = ask(proxies[contract], prompt)
        if contract == "pull":
            computed, began, arrived = trace.take("computed", "pull", "arrived")
            pull, pulled_after = arrived - began, arrived - computed
        else:
            _, marked, computed, arrived = trace.take("land", "marked", "computed", "arrived")
            left, left_after_mark = arrived - computed, arrived - marked
    if answers["pull"] != answers["layerwise"]:
        raise SystemExit("the contracts give different answers")
    return Times(pull, pulled_after, left, left_after_mark)


def report(chunks: int, times: list[Times], bar: float) -> bool:
    """Print a line; whether it is above the bar."""
    hidden = statistics.median(one.hidden for one in times)
    pull, pulled_after, left, left_after_mark = (
        statistics.median(getattr(one, name) for one in times) * 1e3
        for name in ("pull", "pulled_after", "left", "left_after_mark")
    )
    print(
        f"{PROMPT_TOKENS} tokens in {chunks} chunk{'s' * (chunks > 1)}: pull {pull:5.2f} ms, all there "
        f"{abs(left):5.2f} ms {'after' if left > 0 else 'before'} the prefill's end, {left_after_mark:5.2f} ms after "
        f"its last mark (pull, by way of the proxy: {pulled_after:5.2f} ms after the end); hidden {hidden:.0%}"
        + ("" if hidden >= bar else f"  below the bar of {bar:.0%}"),
        flush=True,
    )
    return hidden >= bar


def measure(transport: str, rounds: int, bar: float) -> bool:
    """Print a line for each number of chunks; whether all are above the bar."""
    rng = random.Random(2)
    good = True
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        model, trace = Path(name) / "model", Trace(Path(name) / "trace")
        command = [sys.executable, "-m", "engine_adapter.torch_engine.cli", "make-model", str(model)]
        subprocess.run([*command, "--size", "small"], check=True, stdout=subprocess.DEVNULL)
        commands = [
            engine(trace.path, model, transport, "--max-num-batched-tokens", str(num_tokens))
            for num_tokens in CHUNKS.values()
        ]
        with served(*commands) as (one, other):
            for chunks, (prefiller, decoder) in zip(CHUNKS, ((one, other), (other, one)), strict=True):
                contracts = ("pull", "layerwise")
                with served(*(proxy(contract, prefiller, decoder) for contract in contracts)) as at:
                    proxies = dict(zip(contracts, at, strict=True))
                    times = []
                    for turn in range(rounds + 1):
                        num_tokens = PROMPT_TOKENS if turn else WARM_UP_TOKENS
                        prompt = [rng.randrange(5, 4000) for _ in range(num_tokens)]
                        times.append(one_prompt(trace, proxies, prompt, bool(turn % 2)))
                    good &= report(chunks, times[1:], bar)
    return good

"""Time to the first token of a long shared prefix, with it in the prefix store and without.

    python -m bench.prefix_store --size small --check

Two real engines, each with a sidecar of its own, share a directory. The first one computes prompts of `--tokens` shared
tokens and a short question, which saves their blocks. The second one, which keeps no prefix cache of its own, is then
asked in turn: a prompt that nobody has seen, one with a saved prefix (out of the directory), and the same again (out of
its sidecar's memory). Both must give the same tokens. Medians; with --check the exit status is 1 unless the directory
makes the first token come at least three times sooner.
"""

from __future__ import annotations

import argparse
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

LEAST_SPEED_UP = 3.0
QUESTION_TOKENS = 20
SETTLE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answered:
    seconds: float
    token_ids: list[int]
    num_cached_tokens: int


@dataclass(frozen=True)
class Times:
    """Median seconds to the first token."""

    computed: float
    from_directory: float
    from_memory: float
    num_cached_tokens: int


@contextlib.contextmanager
def engine(model: Path, *flags: str) -> Iterator[str]:
    """A `pd-engine serve --sidecar auto` process; its URL."""
    command = [
        sys.executable, "-m", "engine_adapter.torch_engine.cli", "serve", "--model", str(model), "--port", "0",
        "--served-model-name", "m", "--sidecar", "auto", "--dtype", "float32", "--log-level", "WARNING", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready"):
            raise SystemExit(f"the engine did not start: {line}")
        yield "http://" + line.split("listen=")[1].split()[0]
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def ask(url: str, prompt: list[int], num_tokens: int = 1) -> Answered:
    body = {
        "model": "m", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started_at = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    seconds = time.perf_counter() - started_at
    details = answer["usage"].get("prompt_tokens_details") or {}
    return Answered(seconds, answer["choices"][0]["token_ids"], details.get("cached_tokens") or 0)


def wait_saved(store: Path, num_blocks: int) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while sum(path.is_file() and path.parent.name != "tmp" for path in store.rglob("*")) < num_blocks:
        if time.monotonic() > deadline:
            raise SystemExit(f"not {num_blocks} blocks in the store after {SETTLE_TIMEOUT_S:g} s")
        time.sleep(0.05)


def measure(model: Path, store: Path, num_tokens: int, rounds: int, *flags: str) -> Times:
    """Raises SystemExit where the second engine's tokens are not the first one's."""
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(5, 400) for _ in range(count)]

    shared = [tokens(num_tokens) for _ in range(rounds)]
    questions = [tokens(QUESTION_TOKENS) for _ in range(rounds)]
    directory = ("--store-dir", str(store))
    with engine(model, *directory, *flags) as url:
        for prefix in shared:
            ask(url, prefix + tokens(QUESTION_TOKENS))
        wait_saved(store, rounds * (num_tokens // 16))
        expected = [ask(url, [*p, *q], 8).token_ids for p, q in zip(shared, questions, strict=True)]
    computed, from_directory, from_memory = [], [], []
    with engine(model, *directory, "--store-memory-bytes", "1GiB", "--no-enable-prefix-caching", *flags) as url:
        ask(url, tokens(64))
        for prefix, question, token_ids in zip(shared, questions, expected, strict=True):
            computed.append(ask(url, tokens(num_tokens + QUESTION_TOKENS)).seconds)
            found = ask(url, prefix + question)
            from_directory.append(found.seconds)
            from_memory.append(ask(url, prefix + question).seconds)
            if ask(url, prefix + question, 8).token_ids != token_ids:
                raise SystemExit("an answer on stored blocks differs from the one that was computed")
    middle = statistics.median
    return Times(middle(computed), middle(from_directory), middle(from_memory), found.num_cached_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description="time to the first token with and without the prefix store")
    parser.add_argument("--size", choices=("tiny", "small"), default="small")
    parser.add_argument("--tokens", type=int, default=1500, help="shared by the prompts (default 1500)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit 1 if the bar is missed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        model, store = Path(directory) / "model", Path(directory) / "store"
        command = [sys.executable, "-m", "engine_adapter.torch_engine.cli", "make-model", str(model)]
        subprocess.run([*command, "--size", arguments.size], check=True, stdout=subprocess.DEVNULL)
        times = measure(model, store, arguments.tokens, arguments.rounds)
    print(f"size={arguments.size} shared tokens={arguments.tokens} rounds={arguments.rounds}")
    print(f"cached tokens said: {times.num_cached_tokens}")
    for name, seconds in (
        ("computed", times.computed), ("from the directory", times.from_directory), ("from memory", times.from_memory)
    ):  # fmt: skip
        print(f"{name:20}{seconds * 1000:9.1f} ms to the first token   {times.computed / seconds:5.2f} x")
    return 1 if arguments.check and times.computed < LEAST_SPEED_UP * times.from_directory else 0


if __name__ == "__main__":
    sys.exit(main())

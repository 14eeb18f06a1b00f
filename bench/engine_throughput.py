"""Tokens per second of the torch engine beside transformers' `generate`, on the same weights in the same run.

    python -m bench.engine_throughput --size small --check

Each round measures transformers at batch 1, the engine at batch 1 and at batch 8, one after the other, so that a noisy
machine disturbs all three; the medians are compared. Greedy, float32, no EOS. With --check the exit status is 1 unless
the engine at batch 1 is at least as fast as transformers and at batch 8 at least three times its own batch 1.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine_adapter.device import usable_cores
from engine_adapter.torch_engine.config import EngineConfig
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.make_model import FAMILIES, SIZES, make_model
from engine_adapter.torch_engine.sequence import EngineRequest, RequestOutput, SamplingParams

LEAST_OVER_TRANSFORMERS = 1.0
LEAST_BATCH_8_OVER_BATCH_1 = 3.0


class EngineBench:
    """Runs batches of prompts through one engine and waits for all of their tokens."""

    def __init__(self, model: Path, num_threads: int) -> None:
        self.engine = Engine(EngineConfig(model=model, dtype="float32", num_threads=num_threads))
        self._outputs: queue.SimpleQueue[list[RequestOutput]] = queue.SimpleQueue()
        self._num_submitted = 0
        self.engine.start(self._outputs.put)

    def tokens_per_s(self, prompts: list[list[int]], num_tokens: int) -> float:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        for prompt in prompts:
            self._num_submitted += 1
            self.engine.submit(EngineRequest(str(self._num_submitted), prompt, sampling))
        num_unfinished = len(prompts)
        while num_unfinished:
            outputs = self._outputs.get(timeout=120)
            num_unfinished -= sum(output.finish_reason is not None for output in outputs)
        return len(prompts) * num_tokens / (time.perf_counter() - start)


def transformers_tokens_per_s(model: Any, prompt: list[int], num_tokens: int) -> float:
    token_ids = torch.tensor([prompt])
    start = time.perf_counter()
    model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return num_tokens / (time.perf_counter() - start)


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Fresh ones each round, so that the prefix cache has no part in it."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(3, vocab_size, (num_prompts, num_tokens), generator=generator).tolist()
    return prompts


def measure(arguments: argparse.Namespace, model_dir: Path) -> tuple[float, float, float]:
    """Median tokens/s of transformers batch 1, engine batch 1, engine batch 8."""
    torch.set_num_threads(arguments.num_threads)
    reference: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    bench = EngineBench(model_dir, arguments.num_threads)
    rounds: list[tuple[float, float, float]] = []
    for index in range(arguments.rounds + 1):
        prompts = random_prompts(8, arguments.prompt_tokens, reference.config.vocab_size, index)
        rounds.append(
            (
                transformers_tokens_per_s(reference, prompts[0], arguments.tokens),
                bench.tokens_per_s(prompts[:1], arguments.tokens),
                bench.tokens_per_s([*prompts[1:], prompts[0][::-1]], arguments.tokens),
            )
        )
    bench.engine.shutdown()
    transformers_b1, engine_b1, engine_b8 = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    return transformers_b1, engine_b1, engine_b8


def main() -> int:
    parser = argparse.ArgumentParser(description="tokens/s of the torch engine beside transformers' generate")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3")
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms up (default 7)")
    parser.add_argument("--tokens", type=int, default=128, help="generated a request (default 128)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each prompt (default 32)")
    parser.add_argument("--num-threads", type=int, default=usable_cores())
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), arguments.family, arguments.size)
        transformers_b1, engine_b1, engine_b8 = measure(arguments, Path(directory))
    over_transformers, over_batch_1 = engine_b1 / transformers_b1, engine_b8 / engine_b1
    print(f"model={arguments.family}-{arguments.size} threads={arguments.num_threads} rounds={arguments.rounds}")
    print(f"transformers generate, batch 1: {transformers_b1:8.1f} tokens/s")
    print(f"engine, batch 1:                {engine_b1:8.1f} tokens/s  {over_transformers:.2f} x transformers")
    print(f"engine, batch 8:                {engine_b8:8.1f} tokens/s  {over_batch_1:.2f} x batch 1")
    passed = over_transformers >= LEAST_OVER_TRANSFORMERS and over_batch_1 >= LEAST_BATCH_8_OVER_BATCH_1
    return 1 if arguments.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())

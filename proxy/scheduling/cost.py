"""What a request costs an instance, in tokens, guessed before anybody has tokenised it."""

from __future__ import annotations

from typing import NamedTuple

from proxy.load_ledger import InstanceLoad, Reservation
from proxy.openai_api import ApiCall

# A step costs something whatever it computes. The seeds' formula has 120.07 + 0.0345 * tokens, which makes short
# prompts all alike (ascend-proxy.md 2.1); 64 tokens of overhead keeps a short prompt cheap and not free.
STEP_OVERHEAD_TOKENS = 64
# A stream's place in the decode batch, in tokens of KV read per step; beyond it the KV it holds counts.
STREAM_TOKENS = 256
# What a decode step costs whatever is in the batch, in tokens of KV read: the weights (a 7B model in 16 bits has 14 GB
# of them and 131 KB of KV a token) and the launch.
DECODE_STEP_TOKENS = 100_000
UNKNOWN_OUTPUT_TOKENS = 256
MAX_EXPECTED_OUTPUT_TOKENS = 1024  # clients ask for far more than they use
# Prompts times choices that count. `n` is the client's word: what is counted must fit the load board's 64 bits whatever
# it says, and an engine refuses more than a few thousand.
MAX_COUNTED_STREAMS = 4096


class Cost(NamedTuple):
    prefill_tokens: int
    decode_tokens: int
    kv_tokens: int
    """Of KV it is expected to hold on the decoder when it ends."""


def cost_of(call: ApiCall) -> Cost:
    prompt = call.num_prompt_tokens
    output = min(call.max_new_tokens or UNKNOWN_OUTPUT_TOKENS, MAX_EXPECTED_OUTPUT_TOKENS)
    num_streams = min(call.num_prompts * call.num_choices, MAX_COUNTED_STREAMS)
    kv_tokens = prompt + num_streams * output
    return Cost(prompt + STEP_OVERHEAD_TOKENS, kv_tokens + num_streams * STREAM_TOKENS, kv_tokens)


def fixed_tokens(role: str) -> int:
    """What an instance of `role` does whatever is open on it, in tokens."""
    return DECODE_STEP_TOKENS if role == "decode" else 0


def expected_wait(role: str, load: InstanceLoad, num_tokens: int = 0) -> float:
    """Seconds until the instance is through with what is open on it and `num_tokens` more (prefill), or that a step
    over all of that takes (decode)."""
    return (load.num_tokens + num_tokens) / load.speed + fixed_tokens(role) / load.even_speed


def step_tokens(load: InstanceLoad, reservation: Reservation) -> float:
    """What a step of the decoder has cost [tokens], on average from `reservation` until now, when it ends."""
    return DECODE_STEP_TOKENS + (reservation.ahead + reservation.num_tokens + load.num_tokens + load.others_tokens) / 2

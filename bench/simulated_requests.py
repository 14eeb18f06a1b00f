"""The requests of the policy simulator: seeded, long-tailed, some of them turns of conversations."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.openai_api import ApiCall
from proxy.scheduling import Prefix
from proxy.scheduling.cost import Cost, cost_of

# Medians and spreads of the size of published traces of chat services (the Azure LLM inference traces of 2023 have a
# median prompt of about 1,000 tokens and answers of about 130 to 250), with tails as long as coding assistants have.
PROMPT_TOKENS_MEDIAN, PROMPT_TOKENS_SIGMA, PROMPT_TOKENS_MAX = 1000, 1.2, 32_000
OUTPUT_TOKENS_MEDIAN, OUTPUT_TOKENS_SIGMA, OUTPUT_TOKENS_MAX = 200, 1.0, 4_000
CONVERSATION_SHARE = 0.25  # of the arrivals begin a conversation; its next turn begins with this one and its answer
MEAN_TURNS = 3.0
THINK_S = 20.0  # mean time between the turns of a conversation
CHUNK_TOKENS = 256
LIMIT_SHARE = 0.5  # of the clients say max_tokens, the next power of two above what they get


@dataclass(slots=True, eq=False)
class Request:
    """An `Ask`, and what only the simulation knows of it. Times in seconds."""

    arrived: float
    prompt_tokens: int
    output_tokens: int
    cost: Cost
    body_bytes: int
    session_key: bytes
    prefix: Prefix
    first_at: float = 0.0
    ended_at: float = 0.0
    attempts: int = 0
    avoid: set[object] = field(default_factory=set)


def requests_of(seed: int, count: int, seconds_of: Callable[[int], float]) -> list[Request]:
    """`count` requests in order of arrival, over the time that all of them take if one with a prompt of x tokens takes
    `seconds_of(x)`."""
    rng = random.Random(seed)
    turns = [turn for number in range(count) for turn in _turns(rng, number, rng.random() * count)][:count]
    total_s = sum(seconds_of(prompt) for _, _, prompt, _, _ in turns)
    drawn = []
    for conversation, turn, prompt, output, place in turns:
        arrived = place / count * total_s
        if turn:
            arrived += sum(rng.expovariate(1 / THINK_S) for _ in range(turn))
        arrived %= total_s  # what comes after the end counts as begun before the start: the load is the same throughout
        drawn.append(_request(rng, arrived, conversation, prompt, output))
    return sorted(drawn, key=lambda one: one.arrived)


def _turns(rng: random.Random, conversation: int, place: float) -> list[tuple[int, int, int, int, float]]:
    num_turns = 1
    if rng.random() < CONVERSATION_SHARE:
        num_turns += int(rng.expovariate(1 / MEAN_TURNS))
    prompt = 0
    found = []
    for turn in range(num_turns):
        prompt += _long_tailed(rng, PROMPT_TOKENS_MEDIAN, PROMPT_TOKENS_SIGMA, PROMPT_TOKENS_MAX)
        output = _long_tailed(rng, OUTPUT_TOKENS_MEDIAN, OUTPUT_TOKENS_SIGMA, OUTPUT_TOKENS_MAX)
        if prompt > PROMPT_TOKENS_MAX:
            break
        found.append((conversation, turn, prompt, output, place))
        prompt += output
    return found


def _long_tailed(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return min(max(int(rng.lognormvariate(math.log(median), sigma)), 8), most)


def _request(rng: random.Random, arrived: float, conversation: int, prompt: int, output: int) -> Request:
    body_bytes = int(prompt * rng.uniform(3.0, 5.0)) + 120  # the proxy guesses 4 bytes a token
    limit = 1 << output.bit_length() if rng.random() < LIMIT_SHARE else None
    call = ApiCall("completions", b"", {}, True, body_bytes // 4 + 1, limit, 1, False)
    keys = tuple(conversation << 20 | chunk for chunk in range(prompt // CHUNK_TOKENS))
    session = b"%d" % conversation
    return Request(arrived, prompt, output, cost_of(call), body_bytes, session, Prefix(keys, CHUNK_TOKENS))

"""From logits to tokens, one request's result independent of who else is in the batch.

Meaning and order are vLLM's (v1/sample/sampler.py): logprobs come from the raw logits; then min_tokens, logit_bias and
penalties; then temperature, min_p, top_k and top_p; then an exponential race with the request's own generator. A
temperature below GREEDY_BELOW is greedy: the exact argmax, the lowest id among equals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_adapter.torch_engine.sequence import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
_LOWEST_TEMPERATURE = 0.01
"""vLLM's floor for temperatures that aren't greedy: below it logits overflow."""


class SamplingState:
    """What sampling one request needs to remember: its generator and its token counts."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """`seed` is used where the request brings none."""
        self.params = params
        self.num_output_tokens = 0
        self.is_greedy = params.temperature < GREEDY_BELOW
        self.is_plain_greedy = self.is_greedy and not _changes_logits(params)
        self._held_back = sorted({*eos_token_ids, *params.stop_token_ids}) if params.min_tokens else []
        self._generator: torch.Generator | None = None
        if not self.is_greedy:
            self._generator = torch.Generator(device=device)
            self._generator.manual_seed(seed if params.seed is None else params.seed % (1 << 63))
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None
        if _has_penalties(params):
            self._counts = torch.zeros(vocab_size, device=device)
            self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._in_prompt[torch.tensor(prompt_token_ids, dtype=torch.int64, device=device)] = True
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            self._bias = (
                torch.tensor(list(params.logit_bias), device=device),
                torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device),
            )

    def accept(self, token_id: int) -> None:
        """Count a token that was generated."""
        self.num_output_tokens += 1
        if self._counts is not None:
            self._counts[token_id] += 1

    def sample(self, raw_logits: Tensor) -> int:
        """The next token by logits [vocabulary], which stay as they are."""
        logits = self._adjust(raw_logits.clone())
        if self._generator is None:
            return int(logits.argmax())
        params = self.params
        logits /= max(params.temperature, _LOWEST_TEMPERATURE)
        if params.min_p > 0:
            probs = logits.softmax(dim=-1)
            logits.masked_fill_(probs < params.min_p * probs.max(), float("-inf"))
        _keep_top(logits, params.top_k, params.top_p)
        probs = logits.softmax(dim=-1)
        race = torch.empty_like(probs).exponential_(generator=self._generator)
        return int(probs.div_(race).argmax())

    def _adjust(self, logits: Tensor) -> Tensor:
        params = self.params
        if self._held_back and self.num_output_tokens < params.min_tokens:
            logits[self._held_back] = float("-inf")
        if self._bias is not None:
            logits[self._bias[0]] += self._bias[1]
        if self._counts is None or self._in_prompt is None:
            return logits
        seen = self._counts > 0
        if params.repetition_penalty != 1.0:
            repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits = torch.where(seen | self._in_prompt, repeated, logits)
        return logits - params.frequency_penalty * self._counts - params.presence_penalty * seen


def _has_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1.0


def _changes_logits(params: SamplingParams) -> bool:
    return _has_penalties(params) or bool(params.logit_bias) or params.min_tokens > 0


def _keep_top(logits: Tensor, top_k: int, top_p: float) -> None:
    """Mask all but the k likeliest, then all but the fewest that together reach probability p (at least one)."""
    vocab_size = logits.shape[-1]
    if 0 < top_k < vocab_size:
        logits.masked_fill_(logits < logits.topk(top_k).values[-1], float("-inf"))
    if top_p < 1.0:
        ascending, order = logits.sort()
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[-1] = False
        logits[order[dropped]] = float("-inf")


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """One token a row of logits [requests, vocabulary] float32."""
    if all(state.is_plain_greedy for state in states):
        token_ids: list[int] = logits.argmax(dim=-1).tolist()
        return token_ids
    return [
        int(row.argmax()) if state.is_plain_greedy else state.sample(row)
        for row, state in zip(logits, states, strict=True)
    ]


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of `token_ids`, one a row of raw logits [tokens, vocabulary], beside the `num_top` likeliest.

    A rank is the number of tokens at least as likely, itself included (vLLM's).
    """
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs >= chosen).sum(dim=-1).tolist()
    top = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1) if num_top else None
    top_rows = (
        [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        if top is not None
        else [[] for _ in token_ids]
    )
    return [
        TokenLogprobs(token_id, logprob, rank, likeliest)
        for token_id, logprob, rank, likeliest in zip(token_ids, chosen[:, 0].tolist(), ranks, top_rows, strict=True)
    ]

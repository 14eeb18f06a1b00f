"""What is asked of the engine, what it answers, and a request's life inside it. Pure: no clock, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal

from engine_adapter.push_params import wants_push
from engine_adapter.torch_engine.prompt_images import PromptImages

FinishReason = Literal["stop", "length", "abort", "error"]


class EngineRequestError(Exception):
    """One request can't be served. `status` and `error_type` are what an HTTP server answers; the engine lives on."""

    def __init__(self, message: str, error_type: str = "BadRequestError", status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.error_type = error_type
        self.status = status


@dataclass(slots=True)
class SamplingParams:
    """vLLM's sampling parameters, with vLLM's meaning and defaults."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 mean off."""
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. n: those of the sampled token and of the n likeliest ones at its place."""
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None


@dataclass(slots=True)
class EngineRequest:
    """One prompt, one continuation. `arrival_time` in seconds of any one clock: it only orders the queue."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    kv_transfer_params: dict[str, Any] | None = None
    priority: int = 0
    """Lower runs first, as in vLLM."""
    arrival_time: float = 0.0
    images: PromptImages | None = None
    """What the prompt's image tokens stand for."""

    @property
    def image_hashes(self) -> list[str]:
        return self.images.hashes if self.images is not None else []


@dataclass(slots=True)
class TokenLogprobs:
    """Log probability of one token by the raw logits (before penalties and temperature). `rank` counts from 1."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = field(default_factory=list)
    """(token id, logprob), likeliest first, as many as were asked for."""


@dataclass(slots=True)
class RequestOutput:
    """What one step gave one request. The last one of a request has a `finish_reason`."""

    request_id: str
    token_ids: list[int]
    """New tokens of this step; a stop or EOS token that ended the request is included."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a new token, where asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Once, with the first output; entry 0 is None (nothing precedes the first token)."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The id out of `stop_token_ids` that ended the request; None for EOS."""
    kv_transfer_params: dict[str, Any] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens not computed here: local prefix cache and external KV."""
    error: EngineRequestError | None = None


class SequenceState(Enum):
    """Where a request stands. Legal moves are the table `LEGAL_TRANSITIONS`."""

    WAITING = auto()
    WAITING_FOR_REMOTE_KV = auto()
    """Blocks are allocated and a pull writes into them."""
    RUNNING = auto()
    ABANDONED = auto()
    """Aborted while a pull wrote into its blocks; they are freed when the pull is reported ended."""
    OFFERED = auto()
    """Finished here, blocks held for a remote decoder."""
    FINISHED = auto()


LEGAL_TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset(
        {SequenceState.RUNNING, SequenceState.WAITING_FOR_REMOTE_KV, SequenceState.FINISHED}
    ),
    SequenceState.WAITING_FOR_REMOTE_KV: frozenset(
        {SequenceState.RUNNING, SequenceState.WAITING, SequenceState.ABANDONED, SequenceState.FINISHED}
    ),
    SequenceState.RUNNING: frozenset({SequenceState.WAITING, SequenceState.OFFERED, SequenceState.FINISHED}),
    SequenceState.ABANDONED: frozenset({SequenceState.FINISHED}),
    SequenceState.OFFERED: frozenset({SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


class Sequence:
    """A request inside the engine: its tokens, its blocks, and how far its KV is computed."""

    __slots__ = (
        "asked_store",
        "block_hashes",
        "block_ids",
        "loads_from_store",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_external_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_saved_blocks",
        "order",
        "push_params",
        "remote_prefill_params",
        "request",
        "state",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, order: int) -> None:
        self.request = request
        self.order = order
        """Arrival rank; unique."""
        self.state = SequenceState.WAITING
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        """Tokens whose KV is in the pool."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the local prefix cache at the last admission."""
        self.num_external_tokens = 0
        """Prompt tokens whose KV was pulled or came from the prefix store."""
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered_blocks = 0
        self.num_saved_blocks = 0
        """Leading blocks that came from the prefix store or were given to it."""
        self.asked_store = False
        """The prefix store is asked once a request."""
        self.loads_from_store = False
        """What is waited for is a load out of the store, not a pull."""
        params = request.kv_transfer_params or {}
        self.remote_prefill_params = params if params.get("do_remote_prefill") else None
        """Set until the pull has begun (or the parameters were dropped)."""
        self.push_params = params if wants_push(params) else None
        """Set where the prompt's KV is pushed while it is computed: such a sequence keeps its blocks."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens that a prefill forward computes: all but the last one, which is always decoded.

        So a token's KV has the same bits wherever it was computed, here or by a remote prefiller.
        """
        return self.num_prompt_tokens - 1

    @property
    def samples_next(self) -> bool:
        """True where the next decode forward computes the last known token, so its logits are to be sampled."""
        return self.num_computed_tokens == len(self.token_ids) - 1

    @property
    def sort_key(self) -> tuple[int, float, int]:
        """Priority first (lower runs first), then first come, first served."""
        return (self.request.priority, self.request.arrival_time, self.order)

    def move_to(self, state: SequenceState) -> None:
        if state not in LEGAL_TRANSITIONS[self.state]:
            raise AssertionError(f"{self.request_id}: {self.state.name} can't become {state.name}")
        self.state = state

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}, {self.state.name}, {self.num_computed_tokens}/{len(self.token_ids)} tokens, "
            f"{len(self.block_ids)} blocks)"
        )

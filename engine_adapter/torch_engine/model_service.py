"""The served model as the HTTP handlers see it: from a checked request to engine requests that run."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine_adapter.kv_transfer_params import (
    IMAGES_KEY,
    InvalidKvTransferParams,
    RemotePrefill,
    parse_remote_prefill,
    wants_remote_decode,
    wants_remote_prefill,
)
from engine_adapter.push_params import calls_metaserver, check_metaserver, child_id, for_child, wants_push
from engine_adapter.torch_engine.api_errors import ApiError, context_too_long, model_not_found, service_unavailable
from engine_adapter.torch_engine.chat_images import ImageReader
from engine_adapter.torch_engine.choice import Choice, Prompt
from engine_adapter.torch_engine.content_parts import ImageSource
from engine_adapter.torch_engine.detokenizer import Detokenizer, StopStrings
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.generation import Generation, PlannedChoice, to_api_error
from engine_adapter.torch_engine.metrics import ServerMetrics
from engine_adapter.torch_engine.openai_requests import GenerationRequest
from engine_adapter.torch_engine.output_router import OutputRouter
from engine_adapter.torch_engine.prompt_images import PromptImages
from engine_adapter.torch_engine.sampling_defaults import SamplingDefaults
from engine_adapter.torch_engine.sequence import EngineRequest, EngineRequestError, SamplingParams
from engine_adapter.torch_engine.tokenizer import Tokenizer

MAX_CHARS_ON_LOOP = 16_384
"""About 4 ms of tokenizing; longer texts go to a thread, so that streams don't stall behind them."""


@dataclass(slots=True)
class ModelService:
    engine: Engine
    tokenizer: Tokenizer
    router: OutputRouter
    metrics: ServerMetrics
    model_name: str
    model_root: str
    image_reader: ImageReader | None = None
    """None for a model that takes text only."""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    num_in_flight: int = 0
    """HTTP requests that generate."""

    @property
    def runs(self) -> bool:
        """The engine can take requests."""
        return self.engine.stats().alive

    def check_model(self, model: str | None) -> None:
        """Raises ApiError (404) for a model that isn't served here."""
        if model is not None and model != self.model_name:
            raise model_not_found(model)

    def admit(self, model: str | None) -> None:
        """Raises ApiError for a model that isn't served here, or when the engine can't take anything."""
        self.check_model(model)
        if self.draining:
            raise service_unavailable("this instance is shutting down")
        if not self.runs:
            raise service_unavailable("the engine is dead: restart this instance")

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= MAX_CHARS_ON_LOOP:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def prompt(self, source: str | list[int], request: GenerationRequest, *, add_special_tokens: bool) -> Prompt:
        """Raises ApiError for an empty prompt or an id the model doesn't have."""
        if isinstance(source, str):
            prompt = Prompt(await self.tokenize(source, add_special_tokens=add_special_tokens), source)
        else:
            prompt = Prompt(source)
            if max(source) >= self.engine.vocab_size:
                raise ApiError(f"Token id {max(source)} is out of vocabulary", param="prompt")
        keep = request.truncate_prompt_tokens
        if keep == -1:
            keep = self.engine.max_model_len - (request.wanted_max_tokens or 1)
        if keep is not None and 0 < keep < len(prompt.token_ids):
            prompt = Prompt(prompt.token_ids[-keep:])
        if not prompt.token_ids:
            raise ApiError("the prompt has no tokens", param="prompt")
        if self.image_reader is not None and self.image_reader.image_token_id in prompt.token_ids:
            raise ApiError("the prompt holds the image token and no image: give images to /v1/chat/completions")
        return prompt

    async def image_prompt(
        self, text: str, sources: Sequence[ImageSource], *, add_special_tokens: bool, prepare: bool
    ) -> tuple[list[int], PromptImages]:
        """The tokens of a text that speaks of these images. `prepare`: they will be prefilled here. Raises ApiError."""
        assert self.image_reader is not None
        images = await self.image_reader.read(sources, prepare=prepare)
        token_ids = await self.tokenize(text, add_special_tokens=add_special_tokens)
        return self.image_reader.place(token_ids, images)

    def prompt_text(self, prompt: Prompt) -> str:
        return self.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def generate(
        self, request: GenerationRequest, prompts: Sequence[Prompt], response_id: str, arrived_at: float
    ) -> Generation:
        """Plan `n` continuations of every prompt; they are submitted when the result is entered. Raises ApiError."""
        plan: list[PlannedChoice] = []
        suffix = uuid.uuid4().hex[:8]
        for prompt_index, prompt in enumerate(prompts):
            sampling = self._sampling(request, len(prompt.token_ids))
            for k in range(request.num_choices):
                index = prompt_index * request.num_choices + k
                name = response_id if len(prompts) == 1 else f"{response_id}-{prompt_index}"
                engine_request_id = f"{name}-{suffix}" if request.num_choices == 1 else f"{k}_{name}-{suffix}"
                seed = None if sampling.seed is None else sampling.seed + k
                kv_params = self._kv_params(request, response_id, prompt_index, k, len(prompts))
                if kv_params is not None and "num_children" in kv_params:
                    kv_params |= {"num_tokens": len(prompt.token_ids), "list_id": f"{response_id}-{suffix}"}
                    if prompt.images is not None:
                        kv_params[IMAGES_KEY] = prompt.images.hashes
                plan.append(
                    PlannedChoice(
                        self._choice(request, prompt, index, engine_request_id),
                        EngineRequest(
                            engine_request_id,
                            prompt.token_ids,
                            replace(sampling, seed=seed),
                            kv_transfer_params=kv_params,
                            priority=request.priority or 0,
                            arrival_time=arrived_at,
                            images=prompt.images,
                        ),
                        follower=index > 0 and kv_params is None and wants_remote_prefill(request.kv_transfer_params),
                    )
                )
        return Generation(self.engine, self.router, self.metrics, plan, arrived_at)

    def release_kv(self, params: dict[str, Any]) -> None:
        """Tell the producer that nobody will read this KV. Raises ApiError where the parameters are incomplete."""
        check_remote_prefill(params)
        request_id = f"release-{uuid.uuid4().hex}"
        try:
            self.engine.submit(
                EngineRequest(request_id, [], SamplingParams(1), kv_transfer_params={**params, "release_only": True})
            )
        except EngineRequestError as error:
            raise to_api_error(error) from error

    def _kv_params(
        self, request: GenerationRequest, response_id: str, prompt_index: int, k: int, num_prompts: int
    ) -> dict[str, Any] | None:
        """Only the first choice takes part in a hand-off; of a push, the first of every prompt.

        A stream can't carry an offer's parameters: it makes none.
        """
        params = request.kv_transfer_params
        if params is None or k > 0:
            return None
        try:
            if calls_metaserver(params):
                check_metaserver(params)
                name = child_id(response_id, prompt_index)
                return {**params, "request_id": name, "num_children": num_prompts}
            if wants_push(params):
                return for_child(params, response_id, prompt_index)
        except InvalidKvTransferParams as error:
            raise ApiError(str(error), param=error.field) from error
        if prompt_index > 0 or (wants_remote_decode(params) and request.stream):
            return None
        if wants_remote_prefill(params):
            check_remote_prefill(params)
        return params

    def _choice(self, request: GenerationRequest, prompt: Prompt, index: int, engine_request_id: str) -> Choice:
        include_stop = bool(request.include_stop_str_in_output)
        stops = request.stop_strings
        detokenizer = Detokenizer(
            self.tokenizer.text_decoder(prompt.token_ids, skip_special_tokens=request.skip_special_tokens is not False),
            StopStrings(stops, include_in_output=include_stop) if stops else None,
            request.min_tokens or 0,
        )
        return Choice(index, prompt, engine_request_id, detokenizer, include_stop)

    def _sampling(self, request: GenerationRequest, num_prompt_tokens: int) -> SamplingParams:
        defaults = self.defaults
        logit_bias = {int(key): max(-100.0, min(100.0, bias)) for key, bias in (request.logit_bias or {}).items()}
        if logit_bias and max(logit_bias) >= self.engine.vocab_size:
            raise ApiError(
                f"token_id(s) {[key for key in logit_bias if key >= self.engine.vocab_size][:8]} in logit_bias contain "
                f"out-of-vocab token ids. Vocabulary size: {self.engine.vocab_size}",
                param="logit_bias",
            )
        return SamplingParams(
            max_tokens=self._max_tokens(request.wanted_max_tokens, num_prompt_tokens),
            min_tokens=request.min_tokens or 0,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            top_k=defaults.top_k if request.top_k is None else request.top_k,
            min_p=defaults.min_p if request.min_p is None else request.min_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=(
                defaults.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
            ),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            logprobs=request.wanted_logprobs,
            prompt_logprobs=request.wanted_prompt_logprobs,
            logit_bias=logit_bias or None,
        )

    def _max_tokens(self, wanted: int | None, num_prompt_tokens: int) -> int:
        limit = self.engine.max_model_len
        if num_prompt_tokens + (wanted or 1) > limit:
            raise context_too_long(limit, num_prompt_tokens, wanted or 1)
        room = limit - num_prompt_tokens
        if self.defaults.max_new_tokens is not None:
            room = min(room, max(1, self.defaults.max_new_tokens))
        return room if wanted is None else min(wanted, room)


def check_remote_prefill(params: dict[str, Any]) -> RemotePrefill:
    """Read a decoder's parameters. Raises ApiError, naming the key at fault."""
    try:
        return parse_remote_prefill(params)
    except InvalidKvTransferParams as error:
        raise ApiError(str(error), param=error.field) from error

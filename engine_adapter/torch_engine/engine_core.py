"""The engine without its thread: requests in, one step at a time, outputs out.

A step: KV events are taken in; the scheduler plans; pulls are started; prompt chunks are prefilled, one after the
other; then all decodes run as one forward and those whose last token was computed are sampled. A failure in a prefill
ends its request, one in the decode forward ends the requests in it, with status 500; everybody else goes on.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import Any

import torch

from engine_adapter.kv_transfer_params import IMAGES_KEY, is_of_images
from engine_adapter.push_params import calls_metaserver, wants_push
from engine_adapter.torch_engine.config import KvLoadFailurePolicy
from engine_adapter.torch_engine.counters import Counters
from engine_adapter.torch_engine.joined_prompts import too_many_at_once
from engine_adapter.torch_engine.kv_transfer import KvTransfer, KvTransferUnavailable, PullResult
from engine_adapter.torch_engine.model_runner import ModelRunner
from engine_adapter.torch_engine.pushes import DELIVERED, Pushes, push_error
from engine_adapter.torch_engine.sampler import SamplingState, sample, token_logprobs
from engine_adapter.torch_engine.scheduler import PrefillChunk, Scheduler, StepPlan
from engine_adapter.torch_engine.sequence import (
    EngineRequest,
    EngineRequestError,
    FinishReason,
    RequestOutput,
    Sequence,
    SequenceState,
    TokenLogprobs,
)
from engine_adapter.torch_engine.step_errors import internal_error, kv_load_error
from engine_adapter.torch_engine.store_use import StoreUse

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Ask:
    """A request's company while its sequence is in the engine."""

    sequence: Sequence
    sampling: SamplingState
    prompt_logprobs: list[TokenLogprobs | None] | None
    max_tokens: int
    num_prompt_tokens_by_source: tuple[int, int] = (0, 0)
    """(local cache hit, external) of the first admission; a preempted sequence's later ones don't count."""
    num_cached_tokens: int = 0
    """What `usage` calls cached: of KV that was pushed here it isn't known what its prefiller had cached."""
    is_started: bool = False

    def take_prompt_logits(self, start: int, logits: torch.Tensor) -> None:
        """Logits of the prompt's tokens from `start` on give the log probabilities of the tokens that follow them."""
        assert self.prompt_logprobs is not None
        following = self.sequence.token_ids[start + 1 : start + 1 + logits.shape[0]]
        del self.prompt_logprobs[start + 1 :]
        self.prompt_logprobs += token_logprobs(logits, following, self.sampling.params.prompt_logprobs or 0)


class EngineCore:
    """Not thread-safe: everything is called by the engine thread (or by a test)."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        *,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        device: torch.device,
        seed: int = 0,
        kv_load_failure_policy: KvLoadFailurePolicy = "fail",
        kv_transfer: KvTransfer | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.kv_transfer = kv_transfer
        self.counters = Counters()
        self._runner = runner
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._seeds = random.Random(seed)
        self._kv_load_failure_policy = kv_load_failure_policy
        self.store_use = StoreUse(scheduler)
        self._asks: dict[str, _Ask] = {}
        self._num_arrived = 0
        self._outputs: list[RequestOutput] = []
        self._pushes = Pushes(scheduler, runner.num_layers, runner.layer_bytes)

    @property
    def has_runnable_work(self) -> bool:
        """True where a step could make progress without news from outside."""
        return self.scheduler.has_runnable_work or bool(self._outputs)

    @property
    def waits_for_kv_events(self) -> bool:
        return bool(self.scheduler.pulling or self.scheduler.offered or self.store_use.is_saving)

    def add(self, request: EngineRequest) -> None:
        """Take a request in; one that can't be served is answered with the next step."""
        params = request.kv_transfer_params or {}
        if params.get("release_only"):
            self._drop(params)
            self._outputs.append(RequestOutput(request.request_id, [], finish_reason="stop"))
            return
        try:
            if request.request_id in self._asks or request.request_id in self.scheduler.offered:
                raise EngineRequestError(f"request id {request.request_id} is in use")
            is_of_other_images = bool(params.get("do_remote_prefill")) and self._check_remote_prefill(request, params)
            wants_nothing = wants_push(params) and self._pushes.check(request, params, self.kv_transfer)
        except EngineRequestError as exc:
            self._outputs.append(RequestOutput(request.request_id, [], finish_reason="error", error=exc))
            return
        if wants_nothing:
            self._outputs.append(RequestOutput(request.request_id, [], finish_reason="stop"))
            return
        seq = Sequence(request, self._num_arrived)
        self._num_arrived += 1
        self._asks[request.request_id] = self._ask_of(seq)
        if request.sampling.prompt_logprobs is not None or is_of_other_images:
            self._drop_lease(seq)  # every prompt position has to be computed here, as in vLLM
        if seq.push_params is not None:
            self._pushes.expect(seq)
        self.scheduler.add(seq)

    def _check_remote_prefill(self, request: EngineRequest, params: dict[str, Any]) -> bool:
        """True where that KV is of other images than the request's, and the prompt is to be computed here instead."""
        if self.kv_transfer is not None:
            self.kv_transfer.check(params)
        if not (calls_metaserver(params) or is_of_images(params, request.image_hashes)):
            if self._kv_load_failure_policy == "recompute":
                return True
            self._drop(params)
            raise kv_load_error("the prompt's images are not those that the prefiller was given")
        num_tokens = params.get("remote_num_tokens")
        if num_tokens is not None and num_tokens != len(request.prompt_token_ids):
            self._drop(params)
            raise EngineRequestError(
                f"kv_transfer_params.remote_num_tokens is {num_tokens}, "
                f"but the prompt has {len(request.prompt_token_ids)} tokens"
            )
        return False

    def _ask_of(self, seq: Sequence) -> _Ask:
        sampling = seq.request.sampling
        state = SamplingState(
            sampling,
            seq.request.prompt_token_ids,
            eos_token_ids=self._eos_token_ids,
            vocab_size=self._vocab_size,
            seed=self._seeds.getrandbits(63),
            device=self._device,
        )
        wants_prompt_logprobs = sampling.prompt_logprobs is not None
        limit = 1 if seq.push_params is not None else sampling.max_tokens
        max_tokens = min(limit, self._max_model_len - seq.num_prompt_tokens)
        return _Ask(seq, state, [None] if wants_prompt_logprobs else None, max_tokens)

    def abort(self, request_id: str) -> None:
        """Forget a request. Its blocks are free at once, or when the pull that writes, or the offer, has ended."""
        ask = self._asks.pop(request_id, None)
        if ask is None:
            if request_id in self.scheduler.offered and self.kv_transfer is not None:
                self._pushes.abort_waiting(request_id)
                self.kv_transfer.revoke(request_id)
            self._outputs = [output for output in self._outputs if output.request_id != request_id]
            return
        seq = ask.sequence
        self._outputs = [output for output in self._outputs if output.request_id != request_id]
        if self.store_use.abandon(seq):
            return
        if seq.state is SequenceState.WAITING_FOR_REMOTE_KV and self.kv_transfer is not None:
            self.scheduler.abandon(seq)
            self.kv_transfer.abandon(request_id)
            return
        self._drop_lease(seq)
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        self._asks.pop(seq.request_id, None)
        self._runner.forget(seq.request_id)
        if seq.push_params is None or not self._pushes.forget(seq, self.kv_transfer):
            self.scheduler.finish(seq)

    def _drop_lease(self, seq: Sequence) -> None:
        """The pull of this sequence will never begin."""
        if seq.remote_prefill_params is not None:
            self._drop(seq.remote_prefill_params)
            seq.remote_prefill_params = None

    def _drop(self, params: dict[str, Any]) -> None:
        if self.kv_transfer is not None:
            self.kv_transfer.drop(params)

    def step(self) -> list[RequestOutput]:
        """Do one step's work; all that is to be told about it."""
        self._take_kv_events()
        self.store_use.take_events()
        plan = self.scheduler.schedule()
        for seq in plan.preempted:
            self._runner.forget(seq.request_id)
        for seq in plan.oversized:
            if self._kv_load_failure_policy == "recompute":
                self._drop_lease(seq)
            else:
                self._fail(seq, too_many_at_once(self.scheduler.block_manager, self.scheduler.max_num_seqs))
        self._start_pulls(plan)
        self.store_use.start_loads(plan)
        if self.kv_transfer is not None:
            for seq, error in self._pushes.begin(plan, self.kv_transfer):
                self._fail(seq, error)
        for chunk in plan.prefills:
            if chunk.sequence.state is SequenceState.RUNNING:
                self._prefill(chunk)
        decodes = [seq for seq in plan.decodes if seq.state is SequenceState.RUNNING]
        if decodes:
            self._decode(decodes)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _take_kv_events(self) -> None:
        if self.kv_transfer is None:
            return
        events = self.kv_transfer.poll()
        for request_id in events.ended_offers:
            seq = self.scheduler.offered.get(request_id)
            if seq is not None:
                self.scheduler.finish(seq)
        for request_id, outcome in events.ended_pushes:
            self._end_push(request_id, outcome)
        for pull in events.pulls:
            seq = self.scheduler.pulling.get(pull.request_id)
            if seq is not None:
                self._end_pull(seq, pull)

    def _end_push(self, request_id: str, outcome: str) -> None:
        push = self._pushes.ended(request_id, outcome)
        if push is None or push.aborted:
            return
        output = push.output or RequestOutput(request_id, [], finish_reason="stop")
        if outcome not in DELIVERED:
            logger.warning("event=kv_push_failed request_id=%s outcome=%s", request_id, outcome)
            output = RequestOutput(request_id, [], finish_reason="error", error=push_error(outcome))
        self._outputs.append(output)
        if push.output is None:  # nobody wants the rest of it
            self._forget(push.sequence)

    def _end_pull(self, seq: Sequence, pull: PullResult) -> None:
        if seq.state is SequenceState.ABANDONED:
            self.scheduler.finish(seq)
        elif pull.ok:
            self.scheduler.pull_succeeded(seq)
        elif self._kv_load_failure_policy == "recompute":
            logger.warning("event=kv_load_failed request_id=%s reason=%s action=recompute", seq.request_id, pull.reason)
            self.scheduler.pull_failed_recompute(seq)
        else:
            logger.warning("event=kv_load_failed request_id=%s reason=%s action=fail", seq.request_id, pull.reason)
            self._fail(seq, kv_load_error(f"the prompt's KV could not be loaded ({pull.reason}): {pull.message}"))

    def _start_pulls(self, plan: StepPlan) -> None:
        for seq in plan.covered_pulls:
            self._drop_lease(seq)
        size = self.scheduler.block_manager.block_size
        for seq in plan.pulls:
            params = seq.remote_prefill_params
            assert params is not None
            first_block = seq.num_computed_tokens // size
            end_block = self.scheduler.block_manager.num_blocks_for(seq.num_prefill_tokens)
            if self.kv_transfer is None:
                self._end_pull(seq, PullResult(seq.request_id, False, "no_connector", "this engine has no sidecar"))
                continue
            block_ids = seq.block_ids[first_block:end_block]
            try:
                if calls_metaserver(params):
                    self.kv_transfer.land(seq.request_id, params, block_ids, first_block, seq.num_prompt_tokens)
                else:
                    self.kv_transfer.start_pull(seq.request_id, params, block_ids, first_block)
            except KvTransferUnavailable as exc:
                self._end_pull(seq, PullResult(seq.request_id, False, "sidecar_lost", str(exc)))

    def _prefill(self, chunk: PrefillChunk) -> None:
        seq = chunk.sequence
        ask = self._asks[seq.request_id]
        self._note_start(ask)
        wants_logprobs = ask.prompt_logprobs is not None and len(ask.prompt_logprobs) < chunk.end + 1
        try:
            on_logits = ask.take_prompt_logits if wants_logprobs else None
            on_written = None if seq.push_params is None else self._pushes.marker(seq, self.kv_transfer)
            self._runner.prefill(chunk, on_logits, on_written)
        except Exception as exc:  # last resort: one request's failure must not end the others
            self._fail(seq, internal_error(exc, [seq]))
            return
        self.scheduler.computed(seq, chunk.end)
        self.store_use.save(seq)

    def _note_start(self, ask: _Ask) -> None:
        """Remember where the prompt's tokens came from, once."""
        if not ask.is_started:
            ask.is_started = True
            seq = ask.sequence
            ask.num_prompt_tokens_by_source = (seq.num_cached_tokens, seq.num_external_tokens)
            was_pushed = calls_metaserver(seq.request.kv_transfer_params)
            ask.num_cached_tokens = seq.num_cached_tokens + (0 if was_pushed else seq.num_external_tokens)

    def _decode(self, seqs: list[Sequence]) -> None:
        try:
            logits = self._runner.decode(seqs)
            sampled = [index for index, seq in enumerate(seqs) if seq.samples_next]
            asks = [self._asks[seqs[index].request_id] for index in sampled]
            for ask in asks:
                self._note_start(ask)
            rows = logits if len(sampled) == len(seqs) else logits[sampled]
            token_ids = sample(rows, [ask.sampling for ask in asks]) if asks else []
            logprobs = [self._logprobs_of(rows[index], token_ids[index], ask) for index, ask in enumerate(asks)]
        except Exception as exc:  # last resort, as above
            error = internal_error(exc, seqs)
            for seq in seqs:
                self._fail(seq, error)
            return
        for seq in seqs:
            self.scheduler.computed(seq, seq.num_computed_tokens + 1)
        for ask, token_id, token_logprob in zip(asks, token_ids, logprobs, strict=True):
            self._accept(ask, token_id, token_logprob)

    def _logprobs_of(self, row: torch.Tensor, token_id: int, ask: _Ask) -> list[TokenLogprobs] | None:
        num_top = ask.sampling.params.logprobs
        return None if num_top is None else token_logprobs(row[None], [token_id], num_top)

    def _accept(self, ask: _Ask, token_id: int, logprobs: list[TokenLogprobs] | None) -> None:
        """A request has a new token: tell, and end it where it ends."""
        seq = ask.sequence
        is_first = seq.num_output_tokens == 0
        seq.token_ids.append(token_id)
        ask.sampling.accept(token_id)
        self.counters.num_generation_tokens += 1
        output = RequestOutput(seq.request_id, [token_id], logprobs)
        output.num_cached_tokens = ask.num_cached_tokens
        if is_first:
            output.prompt_logprobs = ask.prompt_logprobs
            self._count_prompt(ask)
        output.finish_reason, output.stop_reason = self._finish_reason(ask, token_id)
        if output.finish_reason is not None and seq.push_params is not None:
            if self._pushes.finish(seq, output):
                self._asks.pop(seq.request_id)
                self._runner.forget(seq.request_id)
                return
            self._forget(seq)
        elif output.finish_reason is not None:
            output.kv_transfer_params = self._offer(ask)
            if seq.state is SequenceState.RUNNING:
                self._forget(seq)
        self._outputs.append(output)

    def _count_prompt(self, ask: _Ask) -> None:
        num_hit, num_external = ask.num_prompt_tokens_by_source
        self.counters.num_prompt_tokens_local_cache_hit += num_hit
        self.counters.num_prompt_tokens_external_kv_transfer += num_external
        self.counters.num_prompt_tokens_local_compute += ask.sequence.num_prompt_tokens - num_hit - num_external

    def _finish_reason(self, ask: _Ask, token_id: int) -> tuple[FinishReason | None, int | None]:
        params = ask.sampling.params
        num_output_tokens = ask.sequence.num_output_tokens
        if num_output_tokens >= params.min_tokens:
            if token_id in self._eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token_id in params.stop_token_ids:
                return "stop", token_id
        return ("length", None) if num_output_tokens >= ask.max_tokens else (None, None)

    def _offer(self, ask: _Ask) -> dict[str, Any] | None:
        """Keep the blocks of a prompt that was asked for by a remote decoder, and say how to get them."""
        seq = ask.sequence
        if not (seq.request.kv_transfer_params or {}).get("do_remote_decode") or self.kv_transfer is None:
            return None
        num_blocks = self.scheduler.block_manager.num_blocks_for(seq.num_prefill_tokens)
        num_cached_tokens = sum(ask.num_prompt_tokens_by_source)
        try:
            params = self.kv_transfer.offer(
                seq.request_id, seq.block_ids[:num_blocks], seq.num_prompt_tokens, num_cached_tokens
            )
        except KvTransferUnavailable as exc:
            logger.warning("event=kv_offer_failed request_id=%s reason=%s", seq.request_id, exc)
            return None
        if seq.request.images is not None:
            params[IMAGES_KEY] = seq.request.image_hashes
        self.scheduler.offer(seq)
        self._asks.pop(seq.request_id)
        self._runner.forget(seq.request_id)
        return params

    def _fail(self, seq: Sequence, error: EngineRequestError) -> None:
        self._outputs.append(RequestOutput(seq.request_id, [], finish_reason="error", error=error))
        self._forget(seq)

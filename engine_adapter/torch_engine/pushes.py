"""Prompts whose KV is pushed to a decoder while it is computed: what the engine core keeps of each.

A push begins when its sequence has blocks, is marked layer by layer from within the forward, and ends when the sidecar
says so. Until then the blocks are held, whatever becomes of the request, and its answer waits: the proxy is to learn
of a push that failed, so that it has the prompt prefilled elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine_adapter.kv_transfer_params import is_of_images
from engine_adapter.mark_pace import MarkPace
from engine_adapter.torch_engine.kv_transfer import KvTransfer, KvTransferUnavailable
from engine_adapter.torch_engine.scheduler import Scheduler, StepPlan
from engine_adapter.torch_engine.sequence import (
    EngineRequest,
    EngineRequestError,
    RequestOutput,
    Sequence,
)
from engine_adapter.torch_engine.step_errors import kv_load_error
from sidecar.protocol import Ready

DELIVERED = frozenset({"consumed", "dropped"})
"""The decoder has it, or said itself that it wants it no more; any other outcome is a failure here."""


@dataclass(slots=True)
class Push:
    """One sequence's push. `first_block`: all before it are computed."""

    sequence: Sequence
    first_block: int
    num_blocks: int
    pace: MarkPace
    outcome: str = ""
    output: RequestOutput | None = None
    """The answer that waits for the end of the push."""
    aborted: bool = False


class Pushes:
    """The pushes of one engine core, on its thread."""

    def __init__(self, scheduler: Scheduler, num_layers: int, layer_bytes: int) -> None:
        """`layer_bytes`: of one block."""
        self._scheduler = scheduler
        self._num_layers = num_layers
        self._layer_bytes = layer_bytes
        self._expected: set[str] = set()
        self._pushes: dict[str, Push] = {}

    def __len__(self) -> int:
        return len(self._expected) + len(self._pushes)

    def check(self, request: EngineRequest, params: dict[str, Any], transfer: KvTransfer | None) -> bool:
        """Whether the decoder has all it wants already. Raises EngineRequestError where nothing can be pushed to it."""
        if transfer is None:
            raise push_error("this engine has no sidecar")
        transfer.check(params)
        landing = params["baton"]
        num_tokens, num_blocks = len(request.prompt_token_ids), landing["num_blocks"]
        if landing["num_tokens"] != num_tokens:
            raise EngineRequestError(
                f"kv_transfer_params.baton.num_tokens is {landing['num_tokens']}, "
                f"but the prompt has {num_tokens} tokens"
            )
        has_blocks = self._scheduler.block_manager.num_blocks_for(num_tokens - 1)
        if landing["landing_id"] and num_blocks != has_blocks:
            raise EngineRequestError(
                f"kv_transfer_params.baton.num_blocks is {num_blocks}, but the prompt has {has_blocks} here: "
                "prefiller and decoder need the same --block-size"
            )
        if landing["landing_id"] and not is_of_images(params, request.image_hashes):
            raise push_error("it was given other images")
        return not landing["landing_id"]

    def expect(self, seq: Sequence) -> None:
        """The sequence is queued; its push begins once it has blocks."""
        self._expected.add(seq.request_id)

    def begin(self, plan: StepPlan, transfer: KvTransfer) -> list[tuple[Sequence, EngineRequestError]]:
        """Begin the pushes of the sequences that a step computes for the first time; those that can't."""
        failed: list[tuple[Sequence, EngineRequestError]] = []
        if not self._expected:
            return failed
        for seq in [*(chunk.sequence for chunk in plan.prefills), *plan.decodes]:
            if seq.request_id not in self._expected:
                continue
            self._expected.discard(seq.request_id)
            params = seq.push_params
            assert params is not None
            blocks = self._scheduler.block_manager
            num_blocks = blocks.num_blocks_for(seq.num_prefill_tokens)
            cached = min(seq.num_computed_tokens // blocks.block_size, num_blocks)
            try:
                ids, ready = seq.block_ids[:num_blocks], Ready(cached, cached, 0)
                transfer.push(seq.request_id, params, ids, seq.num_prompt_tokens, ready)
            except KvTransferUnavailable as exc:
                failed.append((seq, push_error(str(exc))))
                continue
            self._pushes[seq.request_id] = Push(seq, cached, num_blocks, MarkPace(self._layer_bytes))
        return failed

    def marker(self, seq: Sequence, transfer: KvTransfer | None) -> Callable[[int, int], None] | None:
        """To be called in a forward with (tokens written up to, layer); None for a sequence that isn't pushed."""
        push = self._pushes.get(seq.request_id)
        if push is None or push.outcome or transfer is None:
            return None
        block_size, last_layer = self._scheduler.block_manager.block_size, self._num_layers - 1

        def written(end: int, layer: int) -> None:
            is_last = end == seq.num_prefill_tokens
            end_block = push.num_blocks if is_last else end // block_size
            num_blocks = end_block - push.first_block
            if num_blocks > 0 and push.pace.is_due(num_blocks, last=is_last and layer == last_layer):
                transfer.mark_ready(seq.request_id, Ready(push.first_block, end_block, layer + 1))
            if layer == last_layer:
                push.first_block = max(push.first_block, end_block)

        return written

    def finish(self, seq: Sequence, output: RequestOutput) -> bool:
        """Computed to its end: True if `output` has to wait, with the blocks held, False if the push has ended."""
        push = self._pushes[seq.request_id]
        if push.outcome:
            del self._pushes[seq.request_id]
            return False
        push.output = output
        self._scheduler.offer(seq)
        return True

    def forget(self, seq: Sequence, transfer: KvTransfer | None) -> bool:
        """The sequence ends early: True if its blocks are held until its push, now revoked, has ended."""
        self._expected.discard(seq.request_id)
        push = self._pushes.get(seq.request_id)
        if push is None:
            return False
        if push.outcome or transfer is None:
            del self._pushes[seq.request_id]
            return False
        push.aborted = True
        self._scheduler.offer(seq)
        transfer.revoke(seq.request_id)
        return True

    def abort_waiting(self, request_id: str) -> None:
        """Nobody waits for this answer any more."""
        if (push := self._pushes.get(request_id)) is not None:
            push.aborted = True

    def ended(self, request_id: str, outcome: str) -> Push | None:
        """The sidecar's word. None if there is nothing to do now: it is still computed, and asked by `finish`."""
        push = self._pushes.get(request_id)
        if push is None:
            return None
        push.outcome = outcome
        if push.output is None and not push.aborted and outcome == "consumed":
            return None
        del self._pushes[request_id]
        if push.output is not None or push.aborted:
            self._scheduler.finish(push.sequence)
        return push


def push_error(message: str) -> EngineRequestError:
    """Retried by a proxy, elsewhere, and no evidence against this instance: of its own sidecar /health tells."""
    return kv_load_error(f"the prompt's KV could not be pushed to its decoder: {message}")

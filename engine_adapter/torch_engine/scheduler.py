"""Which tokens the next step computes. Pure: no clock, no torch, no sockets.

Two kinds of work, because every token's bits must depend on its own sequence only (see batch_invariant.py): the
prompt's tokens but the last are *prefilled* in chunks, the last one and all generated ones are *decoded*, one a step. A
step has a token budget: running decodes come first, then running prefills, then whoever waits, by priority and arrival.

A sequence that lost its blocks (preempted, youngest first) starts again from its prompt and replays its generated
tokens through the decode path, so that its KV and its further text are what they would have been.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from engine_adapter.torch_engine.block_manager import BlockManager
from engine_adapter.torch_engine.joined_prompts import hash_prompt, joined, never_fits
from engine_adapter.torch_engine.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Prompt tokens [start, end) of one sequence."""

    sequence: Sequence
    start: int
    end: int


@dataclass(slots=True)
class StepPlan:
    """One step's work. A sequence whose last chunk is here may be in `decodes` too: prefills are computed first."""

    prefills: list[PrefillChunk] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    pulls: list[Sequence] = field(default_factory=list)
    """Admitted to WAITING_FOR_REMOTE_KV: pull from block num_computed_tokens // block_size on."""
    loads: list[Sequence] = field(default_factory=list)
    """Admitted likewise: ask the prefix store for full blocks from num_computed_tokens // block_size on."""
    covered_pulls: list[Sequence] = field(default_factory=list)
    """Would have pulled, but the local prefix cache has it all: their producers are to be told."""
    oversized: list[Sequence] = field(default_factory=list)
    """Prompts that are prefilled together and can never be here at once: to be refused, or not to be joined."""
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        is_idle = not (self.prefills or self.decodes or self.oversized)
        return is_idle and not (self.pulls or self.loads or self.covered_pulls)


class Scheduler:
    """The queues, and the blocks of everyone in them.

    `prefill_alignment` is the preferred border of chunks (a chunk that ends elsewhere costs computing a tile twice).
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_alignment: int = 1,
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefill_alignment = prefill_alignment
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.pulling: dict[str, Sequence] = {}
        """WAITING_FOR_REMOTE_KV and ABANDONED, by request id."""
        self.offered: dict[str, Sequence] = {}
        self.num_preemptions = 0
        self.uses_store = False
        """Whether a prefix store is there to be asked; set before each `schedule`."""
        self._is_stuck = False
        """The last `schedule` found nothing to do; only an event or an arrival can change that."""

    @property
    def has_runnable_work(self) -> bool:
        """True where `schedule` could make progress without news from outside.

        A queue whose head could not be admitted while nobody runs waits for blocks that pulls or offers hold.
        """
        return bool(self.running) or (bool(self.waiting) and not self._is_stuck)

    @property
    def num_waiting_for_remote_kv(self) -> int:
        return sum(seq.state is SequenceState.WAITING_FOR_REMOTE_KV for seq in self.pulling.values())

    @property
    def num_blocks_held_by_offers(self) -> int:
        return sum(len(seq.block_ids) for seq in self.offered.values())

    def add(self, seq: Sequence) -> None:
        self._is_stuck = False
        insort(self.waiting, seq, key=lambda waiting: waiting.sort_key)

    def schedule(self) -> StepPlan:
        plan = StepPlan()
        budget = self._plan_decodes(plan, self.max_num_batched_tokens)
        budget = self._plan_running_prefills(plan, budget)
        if not plan.preempted:
            self._admit(plan, budget)
        self._is_stuck = plan.is_empty and not plan.preempted
        return plan

    def _plan_decodes(self, plan: StepPlan, budget: int) -> int:
        for seq in list(self.running):
            if budget == 0:
                break
            if seq.state is not SequenceState.RUNNING or seq.num_computed_tokens < seq.num_prefill_tokens:
                continue
            if self._grow(seq, plan):
                plan.decodes.append(seq)
                budget -= 1
        plan.decodes = [seq for seq in plan.decodes if seq.state is SequenceState.RUNNING]
        return budget

    def _grow(self, seq: Sequence, plan: StepPlan) -> bool:
        """Hold a block for the next token; preempt the least important until one is free, at last `seq` itself."""
        while len(seq.block_ids) * self.block_manager.block_size <= seq.num_computed_tokens:
            block_ids = self.block_manager.allocate(1)
            if block_ids is not None:
                seq.block_ids += block_ids
                continue
            # A decoder may be reading what is pushed; that ends by itself, and never needs another block.
            preemptible = [running for running in self.running if running.push_params is None]
            victim = max(preemptible, key=lambda running: running.sort_key, default=seq)
            self._preempt(victim, plan)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence, plan: StepPlan) -> None:
        self.running.remove(seq)
        self._start_over(seq)
        seq.move_to(SequenceState.WAITING)
        self.add(seq)
        self.num_preemptions += 1
        plan.preempted.append(seq)

    def _plan_running_prefills(self, plan: StepPlan, budget: int) -> int:
        for seq in self.running:
            if budget == 0:
                break
            if seq.num_computed_tokens < seq.num_prefill_tokens:
                budget = self._plan_prefill(seq, plan, budget)
        return budget

    def _plan_prefill(self, seq: Sequence, plan: StepPlan, budget: int) -> int:
        """Plan as much of the rest of the prompt as fits, and the first decode where the budget has room for it."""
        start, end = seq.num_computed_tokens, seq.num_prefill_tokens
        if end - start > budget:
            end = start + budget
            aligned_end = end - end % self.prefill_alignment
            end = aligned_end if aligned_end > start else end
        if end > start:
            plan.prefills.append(PrefillChunk(seq, start, end))
            budget -= end - start
        if end == seq.num_prefill_tokens and budget > 0:
            plan.decodes.append(seq)
            budget -= 1
        return budget

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Take from the head of the queue while slots, blocks and budget last; nobody overtakes."""
        while self.waiting and budget > 0 and len(self.running) + len(self.pulling) < self.max_num_seqs:
            together = joined(self.waiting)
            if not together:
                return
            if not self._hold_blocks_of_all(together):
                if never_fits(together, self.block_manager, self.max_num_seqs):
                    plan.oversized += together
                return
            for seq in together:
                self.waiting.remove(seq)
                budget = self._enter(seq, plan, budget)

    def _enter(self, seq: Sequence, plan: StepPlan, budget: int) -> int:
        """It has its blocks: wait for KV that comes from elsewhere, or run. Returns what is left of the budget."""
        params = seq.remote_prefill_params
        pulls = params is not None and self._num_blocks_to_pull(seq) > 0
        if pulls or (params is None and self._asks_store(seq)):
            seq.move_to(SequenceState.WAITING_FOR_REMOTE_KV)
            self.pulling[seq.request_id] = seq
            if not pulls:
                seq.asked_store = seq.loads_from_store = True
            (plan.pulls if pulls else plan.loads).append(seq)
            return budget
        if params is not None:
            plan.covered_pulls.append(seq)
        seq.move_to(SequenceState.RUNNING)
        insort(self.running, seq, key=lambda running: running.sort_key)
        return self._plan_prefill(seq, plan, budget)

    def _hold_blocks_of_all(self, together: list[Sequence]) -> bool:
        """Slots and blocks for all of them, or for none: two lists that have a part each would wait for ever."""
        if len(self.running) + len(self.pulling) + len(together) > self.max_num_seqs:
            return False
        for index, seq in enumerate(together):
            if not self._hold_blocks(seq):
                for held in together[:index]:
                    self._start_over(held)
                return False
        return True

    def _num_blocks_to_pull(self, seq: Sequence) -> int:
        num_cached_blocks = seq.num_computed_tokens // self.block_manager.block_size
        return self.block_manager.num_blocks_for(seq.num_prefill_tokens) - num_cached_blocks

    def _asks_store(self, seq: Sequence) -> bool:
        """Whether the prefix store might have blocks that this engine would have to compute."""
        size = self.block_manager.block_size
        reads_cache = seq.request.sampling.prompt_logprobs is None
        is_short = seq.num_prefill_tokens // size <= seq.num_computed_tokens // size
        return self.uses_store and reads_cache and not seq.asked_store and not is_short

    def _hold_blocks(self, seq: Sequence) -> bool:
        """Find the cached prefix and hold blocks for all known tokens, or hold nothing and return False.

        One block for every running sequence is left free, or the newcomer would be preempted at once.
        """
        blocks = self.block_manager
        hash_prompt(seq, blocks)
        reads_cache = seq.request.sampling.prompt_logprobs is None
        cached = blocks.acquire_cached_prefix(seq.block_hashes) if reads_cache else []
        num_missing = blocks.num_blocks_for(len(seq.token_ids)) - len(cached)
        reserve = len(self.running)
        fresh = blocks.allocate(num_missing) if num_missing + reserve <= blocks.num_free_blocks else None
        if fresh is None:
            blocks.release(cached)
            return False
        seq.block_ids = cached + fresh
        seq.num_registered_blocks = len(cached)
        seq.num_saved_blocks = max(seq.num_saved_blocks, len(cached))
        seq.num_computed_tokens = seq.num_cached_tokens = len(cached) * blocks.block_size
        return True

    def computed(self, seq: Sequence, num_computed_tokens: int) -> None:
        """The KV of the first `num_computed_tokens` tokens is in the pool: full blocks of prefilled tokens are cached.

        Blocks with decoded tokens are not: a prefill would have given them other last bits.
        """
        seq.num_computed_tokens = num_computed_tokens
        num_full = min(num_computed_tokens, seq.num_prefill_tokens) // self.block_manager.block_size
        for index in range(seq.num_registered_blocks, num_full):
            self.block_manager.register(seq.block_ids[index], seq.block_hashes[index])
        seq.num_registered_blocks = max(seq.num_registered_blocks, num_full)

    def finish(self, seq: Sequence) -> None:
        """It ended: its blocks are given back. For every state but an ABANDONED or OFFERED one that still waits."""
        self._unlink(seq)
        self._release(seq)
        seq.move_to(SequenceState.FINISHED)

    def abandon(self, seq: Sequence) -> None:
        """Aborted while a pull writes into its blocks: they stay held until `pull_ended`."""
        seq.move_to(SequenceState.ABANDONED)

    def offer(self, seq: Sequence) -> None:
        """It ended, and a remote decoder may read the blocks of its prefilled tokens; the others are given back."""
        self._unlink(seq)
        num_kept = self.block_manager.num_blocks_for(seq.num_prefill_tokens)
        self.block_manager.release(seq.block_ids[num_kept:])
        del seq.block_ids[num_kept:]
        seq.move_to(SequenceState.OFFERED)
        self.offered[seq.request_id] = seq

    def pull_succeeded(self, seq: Sequence) -> None:
        """All prefilled tokens are in the pool: decode the last prompt token next."""
        del self.pulling[seq.request_id]
        seq.remote_prefill_params = None
        seq.num_external_tokens = seq.num_prefill_tokens - seq.num_cached_tokens
        self.computed(seq, seq.num_prefill_tokens)
        seq.move_to(SequenceState.RUNNING)
        insort(self.running, seq, key=lambda running: running.sort_key)

    def load_ended(self, seq: Sequence, num_blocks: int) -> None:
        """The next `num_blocks` blocks came from the prefix store: compute what follows."""
        del self.pulling[seq.request_id]
        seq.loads_from_store = False
        seq.num_external_tokens = num_blocks * self.block_manager.block_size
        self.computed(seq, seq.num_computed_tokens + seq.num_external_tokens)
        seq.num_saved_blocks = max(seq.num_saved_blocks, seq.num_registered_blocks)
        seq.move_to(SequenceState.RUNNING)
        insort(self.running, seq, key=lambda running: running.sort_key)

    def pull_failed_recompute(self, seq: Sequence) -> None:
        """Back to the queue, to be prefilled here."""
        del self.pulling[seq.request_id]
        seq.remote_prefill_params = None
        self._start_over(seq)
        seq.move_to(SequenceState.WAITING)
        self.add(seq)

    def _unlink(self, seq: Sequence) -> None:
        if seq.state is SequenceState.WAITING:
            self.waiting.remove(seq)
        elif seq.state is SequenceState.RUNNING:
            self.running.remove(seq)
        elif seq.state is SequenceState.OFFERED:
            del self.offered[seq.request_id]
        else:
            del self.pulling[seq.request_id]

    def _start_over(self, seq: Sequence) -> None:
        """It holds nothing, and nothing of it is computed."""
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.num_registered_blocks = 0

    def _release(self, seq: Sequence) -> None:
        self.block_manager.release(seq.block_ids)
        seq.block_ids = []

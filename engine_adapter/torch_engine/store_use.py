"""How the engine core uses the prefix store: asks it before it computes, gives it what it has computed."""

from __future__ import annotations

from engine_adapter.torch_engine.prefix_store import PrefixStore
from engine_adapter.torch_engine.scheduler import Scheduler, StepPlan
from engine_adapter.torch_engine.sequence import Sequence, SequenceState


class StoreUse:
    """Belongs to the engine thread. Does nothing while `store` is None or away."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.store: PrefixStore | None = None
        self._scheduler = scheduler
        self._saving: dict[str, list[int]] = {}
        """Blocks held until the store has read them, by save."""
        self._num_saves = 0

    @property
    def is_saving(self) -> bool:
        return bool(self._saving)

    def take_events(self) -> None:
        """Let go of blocks that were read, and go on with prompts whose load has ended, however it ended."""
        if self.store is None:
            return
        scheduler = self._scheduler
        scheduler.uses_store = self.store.available
        events = self.store.poll()
        for save_id in events.ended_saves:
            scheduler.block_manager.release(self._saving.pop(save_id))
        for load in events.loads:
            seq = scheduler.pulling.get(load.request_id)
            if seq is not None and seq.state is SequenceState.ABANDONED:
                scheduler.finish(seq)
            elif seq is not None:
                scheduler.load_ended(seq, load.num_blocks)

    def start_loads(self, plan: StepPlan) -> None:
        size = self._scheduler.block_manager.block_size
        for seq in plan.loads:
            first, end = seq.num_computed_tokens // size, seq.num_prefill_tokens // size
            assert self.store is not None
            self.store.load(seq.request_id, seq.block_hashes[first:end], seq.block_ids[first:end])

    def abandon(self, seq: Sequence) -> bool:
        """Whether `seq` was waiting for a load; then its blocks are freed when that has ended."""
        if not seq.loads_from_store or self.store is None:
            return False
        self._scheduler.abandon(seq)
        self.store.abandon(seq.request_id)
        return True

    def save(self, seq: Sequence) -> None:
        """Give the store the full blocks that were computed since the last call; they are held until it has them."""
        first, end = seq.num_saved_blocks, seq.num_registered_blocks
        if self.store is None or not self.store.available or end <= first:
            return
        seq.num_saved_blocks = end
        self._num_saves += 1
        save_id, block_ids = str(self._num_saves), seq.block_ids[first:end]
        self._scheduler.block_manager.hold(block_ids)
        self._saving[save_id] = block_ids
        self.store.save(save_id, seq.block_hashes[first:end], block_ids)

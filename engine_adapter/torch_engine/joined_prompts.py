"""Prompts of one request whose prefill starts when all of them have blocks here: they enter together. Pure.

The proxy joins what a layerwise decoder posts for each prompt of a list in one prefill. A part of a list that has
blocks waits for the rest, and so holds them in vain while others do the same.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from engine_adapter.push_params import calls_metaserver
from engine_adapter.torch_engine.block_manager import BlockManager
from engine_adapter.torch_engine.sequence import EngineRequestError, Sequence


def joined(waiting: AbstractSequence[Sequence]) -> list[Sequence]:
    """The head of the queue, with all that it is joined with; empty where there is none.

    A list of which some have not arrived yet is passed over: what if they never do?
    """
    for head in waiting:
        list_id, num_children = _list_of(head)
        if num_children == 1:
            return [head]
        members = [seq for seq in waiting if _list_of(seq)[0] == list_id]
        if len(members) == num_children:
            return members
    return []


def _list_of(seq: Sequence) -> tuple[str, int]:
    params = seq.remote_prefill_params
    if params is None or not calls_metaserver(params):
        return "", 1
    return params.get("list_id", ""), params.get("num_children", 1)


def never_fits(together: AbstractSequence[Sequence], blocks: BlockManager, max_num_seqs: int) -> bool:
    """Whether an idle engine could not hold them all at once, with what is in its prefix cache now."""
    if len(together) > max_num_seqs:
        return True
    if sum(blocks.num_blocks_for(len(seq.token_ids)) for seq in together) <= blocks.num_blocks:
        return False
    shared: set[int] = set()
    num_missing = 0
    for seq in together:
        hash_prompt(seq, blocks)
        cached = blocks.acquire_cached_prefix(seq.block_hashes)
        blocks.release(cached)
        shared.update(cached)
        num_missing += blocks.num_blocks_for(len(seq.token_ids)) - len(cached)
    return len(shared) + num_missing > blocks.num_blocks


def hash_prompt(seq: Sequence, blocks: BlockManager) -> None:
    """Hash the full blocks of its prefilled tokens, as far as they are not."""
    num_full_blocks = seq.num_prefill_tokens // blocks.block_size
    images = seq.request.images
    key_of = images.key_of if images is not None else None
    seq.block_hashes = blocks.hash_full_blocks(seq.token_ids, num_full_blocks, seq.block_hashes, key_of)


def too_many_at_once(blocks: BlockManager, max_num_seqs: int) -> EngineRequestError:
    """The client's fault: no other time and no other try would do."""
    return EngineRequestError(
        f"the prompts of this request can't be held at once, in {blocks.num_blocks} blocks of {blocks.block_size} "
        f"tokens and {max_num_seqs} sequences: send fewer prompts a request"
    )

"""Prefill, then decode: the decoder is told by the prefiller's answer where the KV is."""

from __future__ import annotations

from time import monotonic

from proxy.answer import Answer
from proxy.errors import UpstreamFailure
from proxy.flow import Flow
from proxy.kv_ledger import KvState
from proxy.legs import Legs, PassOn
from proxy.openai_api import without_prompt_scores
from proxy.prompt_facts import cached_tokens_of, prompt_tokens_of, speaks_of_limits
from proxy.retry import Action, Leg


async def prefill_first(flow: Flow, legs: Legs) -> Answer:
    while True:
        if flow.split and not flow.prefilled:
            try:
                await _prefill(flow, legs)
            except PassOn as refused:
                if refused.answer.status not in (400, 422) or not speaks_of_limits(refused.answer.body):
                    raise
                # It speaks of the one token it was asked for. The decoder, asked as the client asked, has the words.
                flow.split = False
                legs.reporter.recompute("prefiller_refused_limits")
        answer = await _decode(flow, legs)
        if answer is not None:
            return answer


async def _prefill(flow: Flow, legs: Legs) -> None:
    """Leaves the KV in `flow.entry`, or none if the prefiller gave none. Raises ProxyError or PassOn."""
    body = legs.contract.prefill_body(flow.call)
    fresh = False
    while True:
        instance, load = legs.reserve_prefiller(flow, fresh)
        flow.prefill_attempts += 1
        began = monotonic()
        flow.sent_at = flow.sent_at or began
        try:
            answer = await legs.exchange(flow, instance, body, Leg.PREFILL, fresh)
            kv = legs.kv_of(answer, instance)
        except UpstreamFailure as failure:
            fresh = await legs.after(Leg.PREFILL, failure, instance, flow) is Action.SAME_INSTANCE
            continue
        finally:
            load.release()
        flow.prefilled = True
        flow.prefilled_at = now = legs.prefilled(instance, load, began)
        if flow.call.scores_prompt:
            flow.scored_prompt = answer.body
        if kv is None:
            legs.reporter.recompute("prefiller_gave_no_kv")
        else:
            flow.entry = legs.ledger.hand_out(flow.upstream_id, instance.key, kv, now)
        flow.note_prefill_usage(prompt_tokens_of(answer.body), cached_tokens_of(answer.body, kv))
        return


async def _decode(flow: Flow, legs: Legs) -> Answer | None:
    """One attempt. None means: failed, try again as `flow` stands now. Raises ProxyError or PassOn."""
    if flow.decoder is None:
        legs.reserve_decoder(flow)
    instance = flow.decoder
    assert instance is not None
    call = flow.call if flow.scored_prompt is None else without_prompt_scores(flow.call)
    body = legs.contract.decode_body(call, flow.kv)
    flow.budget.spend(Leg.DECODE)
    flow.sent_at = flow.sent_at or monotonic()
    try:
        answer = await legs.exchange(flow, instance, body, Leg.DECODE, False)
    except UpstreamFailure as failure:
        action = await legs.after(Leg.DECODE, failure, instance, flow)
        legs.let_go_of_decoder(flow)
        if action is Action.PREFILL_AGAIN:
            legs.give_kv_back(flow)
            flow.prefilled = False
        return None
    flow.first_event_at = monotonic()
    if flow.entry is not None:
        legs.ledger.move(flow.entry, KvState.CONSUMED)
        flow.entry = None
    return answer

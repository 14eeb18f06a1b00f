"""The decoder first: it calls the metaserver when it has blocks for the KV, and that call starts the prefill.

Whoever fails, the other leg is ended at once: a decoder whose prefill never comes would wait for ever, and a prefiller
must not push into blocks that are another request's by then. Every attempt has an id of its own, so that no call of an
attempt that was given up is taken for a call of the next.
"""

from __future__ import annotations

import asyncio
import secrets
from time import monotonic
from typing import Any

from proxy.answer import Answer
from proxy.contracts.layerwise import LayerwiseContract
from proxy.errors import Failure, UpstreamFailure, error_body
from proxy.flow import Flow
from proxy.instance import Instance
from proxy.legs import Legs
from proxy.metaserver import Handoff
from proxy.retry import Action, Leg
from proxy.stories.called_off import call_off
from proxy.stories.prefill_first import prefill_first


async def decode_first(flow: Flow, legs: Legs) -> Answer:
    if not flow.split:
        return await prefill_first(flow, legs)  # which has no prefill then: a decoder alone
    while True:
        answer = await _attempt(flow, legs)
        if answer is not None:
            return answer


async def _attempt(flow: Flow, legs: Legs) -> Answer | None:
    """One decoder. None means: failed, try again as `flow` stands now. Raises ProxyError or PassOn."""
    contract, metaserver = legs.contract, legs.metaserver
    assert isinstance(contract, LayerwiseContract)
    if flow.decoder is None:
        legs.reserve_decoder(flow)
    decoder = flow.decoder
    assert decoder is not None
    flow.leg_id = f"{flow.request_id}-{secrets.token_hex(8)}"  # unguessable: an id is what the metaserver trusts
    flow.budget.spend(Leg.DECODE)
    flow.sent_at = flow.sent_at or monotonic()
    body = contract.ask_body(flow.call, metaserver.url)
    ids = contract.child_ids(flow.call, flow.leg_id)
    with metaserver.expect(ids, lambda posted: _prefill(flow, legs, contract, posted)) as handoff:
        decode = asyncio.create_task(legs.exchange(flow, decoder, body, Leg.DECODE, False))
        try:
            ends: set[asyncio.Future[Any]] = {decode, handoff.failed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await call_off(decode, handoff.prefill)
            raise
        if not decode.done():
            await call_off(decode)
            raise handoff.failed.result()
        return await _settle(flow, legs, decoder, decode, handoff)


async def _settle(
    flow: Flow, legs: Legs, decoder: Instance, decode: asyncio.Task[Answer], handoff: Handoff
) -> Answer | None:
    failure = decode.exception()
    if failure is None:
        flow.first_event_at = monotonic()
        answer = decode.result()
        if handoff.prefill is not None and not handoff.prefill.done():
            await legs.let_finish(handoff.prefill, answer)
        return answer
    await call_off(handoff.prefill)
    if not isinstance(failure, UpstreamFailure):
        raise failure
    await legs.after(Leg.DECODE, failure, decoder, flow)
    legs.let_go_of_decoder(flow)
    return None


async def _prefill(flow: Flow, legs: Legs, contract: LayerwiseContract, posted: dict[str, dict[str, Any]]) -> None:
    """Until one prefiller has done it. Raises ProxyError or PassOn when the table has no more."""
    body = contract.push_body(flow.call, posted)
    fresh = False
    while True:
        instance, load = legs.reserve_prefiller(flow, fresh)
        legs.decoder_waits(flow, legs.prefill_s)
        began = monotonic()
        try:
            answer = await legs.exchange(flow, instance, body, Leg.PREFILL, fresh)
            if fault := contract.push_fault(answer.body):
                raise _not_pushed(flow, instance, answer, fault)
        except UpstreamFailure as failure:
            load.release()
            if flow.first_event_at:
                return  # the decoder has it all: what the prefiller says now is of no consequence
            fresh = await legs.after(Leg.PREFILL, failure, instance, flow) is Action.SAME_INSTANCE
            continue
        finally:
            load.release()
        now = legs.prefilled(instance, load, began)
        legs.decoder_waits(flow)
        legs.note_usage(flow, answer.body)
        if not flow.first_event_at:
            flow.prefilled_at = now
        return


def _not_pushed(flow: Flow, instance: Instance, answer: Answer, fault: str) -> UpstreamFailure:
    """As an engine says it that answers when its push has ended: no evidence against it, and retried elsewhere."""
    message = f"kv_load_error: the prompt's KV could not be pushed to its decoder: {fault}"
    error = answer.as_error(503, error_body(503, message, "kv_load_error", route=flow.route))
    return UpstreamFailure(Failure.SERVER_ERROR, f"{instance.key} could not push the KV: {fault}", error)

"""Both legs at once, under a name the proxy minted. When one fails the other is called off at once, and both are tried
again, as the table says for the one that failed, under a new name."""

from __future__ import annotations

import asyncio
import secrets
from time import monotonic

from proxy.answer import Answer
from proxy.bootstrap import RankReservation
from proxy.contracts.pair import Meeting, PairContract
from proxy.errors import Failure, UpstreamFailure
from proxy.flow import Flow
from proxy.instance import Instance
from proxy.kv_ledger import KvState
from proxy.legs import Legs
from proxy.load_ledger import Reservation
from proxy.retry import Action, Leg
from proxy.stories.called_off import call_off
from proxy.stories.prefill_first import prefill_first


async def together(flow: Flow, legs: Legs) -> Answer:
    if not flow.split:
        return await prefill_first(flow, legs)  # which has no prefill then: a decoder alone
    again = False
    while True:
        attempt = _Attempt(flow, legs, again)
        answer = await attempt.run()
        if answer is not None:
            return answer
        again = attempt.again


class _Attempt:
    """One pair. `again`: the prefiller as before has to be asked, on a fresh connection."""

    def __init__(self, flow: Flow, legs: Legs, again: bool) -> None:
        assert isinstance(legs.contract, PairContract)
        self._contract = legs.contract
        self._flow = flow
        self._legs = legs
        self._fresh = again
        self.again = again
        self._decoded = False
        self._kv: dict[str, object] | None = None

    async def run(self) -> Answer | None:
        """None means: failed, try again as the flow stands now. Raises ProxyError or PassOn."""
        flow, legs = self._flow, self._legs
        if flow.decoder is None:
            legs.reserve_decoder(flow)
        decoder = flow.decoder
        assert decoder is not None
        prefiller, load = legs.reserve_prefiller(flow, self._fresh)
        flow.budget.spend(Leg.DECODE)
        flow.prefill_attempts += 1
        rank = None
        if self._contract.ranked:
            try:
                rank = await legs.bootstrap.reserve_rank(prefiller)
            except UpstreamFailure as failure:
                load.release()
                await self._failed(Leg.PREFILL, failure, prefiller)
                return None
        meeting = self._contract.meet(
            flow.call,
            legs.bootstrap.endpoint(prefiller),
            legs.bootstrap.endpoint(decoder),
            None if rank is None else rank.engine,
            secrets.randbits(128),
        )
        flow.leg_id = meeting.request_id
        flow.dispatched = False
        flow.promised = self._kv = meeting.kv
        flow.sent_at = flow.sent_at or monotonic()
        return await self._meet(meeting, prefiller, decoder, load, rank)

    async def _meet(
        self, meeting: Meeting, prefiller: Instance, decoder: Instance, load: Reservation, rank: RankReservation | None
    ) -> Answer | None:
        flow, legs = self._flow, self._legs
        prefill = asyncio.create_task(self._prefill(meeting, prefiller, load, rank))
        decode = None
        try:
            if not self._contract.overlaps:
                await asyncio.wait({prefill})
            if not prefill.done() or prefill.exception() is None:
                # or a slow prefill were the decoder's fault
                more_s = legs.prefill_s if self._contract.overlaps else 0.0
                exchange = legs.exchange(flow, decoder, meeting.decode_body, Leg.DECODE, False, more_s=more_s)
                decode = asyncio.create_task(exchange)
                await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
                if not decode.done() and prefill.exception() is None:
                    await asyncio.wait({decode})
        except asyncio.CancelledError:
            if flow.dispatched:
                flow.promised = None  # the decoder's abort tells the prefiller
            await call_off(prefill, decode)
            load.release()  # a task that is cancelled before its first step gives nothing back
            if rank is not None:
                rank.release()
            self._told_by_abort()
            raise
        if decode is not None and decode.done() and decode.exception() is None:
            return await self._succeeded(prefill, decode.result())
        if prefill.done() and isinstance(failure := prefill.exception(), BaseException):
            await call_off(decode)
            await self._failed(Leg.PREFILL, failure, prefiller)
        elif decode is not None and isinstance(failure := decode.exception(), BaseException):
            await call_off(prefill)
            await self._failed(Leg.DECODE, failure, decoder)
        return None

    async def _prefill(
        self, meeting: Meeting, instance: Instance, load: Reservation, rank: RankReservation | None
    ) -> None:
        """Its answer is read and dropped. Goes on by itself once the decoder has answered."""
        flow, legs = self._flow, self._legs
        began = monotonic()
        try:
            answer = await legs.exchange(
                flow, instance, meeting.prefill_body, Leg.PREFILL, self._fresh, meeting.prefill_lines
            )
        finally:
            load.release()
            if rank is not None:
                rank.release()
        now = legs.prefilled(instance, load, began)
        legs.decoder_waits(flow)
        legs.note_usage(flow, answer.body)
        if not self._decoded:
            flow.prefilled_at = now
            if meeting.kv is not None:
                flow.entry = legs.ledger.hand_out(flow.upstream_id, instance.key, meeting.kv, now)

    async def _succeeded(self, prefill: asyncio.Task[None], answer: Answer) -> Answer:
        flow, legs = self._flow, self._legs
        self._decoded = True
        flow.promised = None
        flow.first_event_at = monotonic()
        if flow.entry is not None:
            legs.ledger.move(flow.entry, KvState.CONSUMED)
            flow.entry = None
        if prefill.done():
            prefill.exception()  # of no consequence any more
        else:
            await legs.let_finish(prefill, answer)
        return answer

    async def _failed(self, leg: Leg, failure: BaseException, instance: Instance) -> None:
        flow, legs = self._flow, self._legs
        if not isinstance(failure, UpstreamFailure):
            raise failure
        if flow.prefiller is not None:
            legs.bootstrap.forget(flow.prefiller)  # whatever happened, it may be another engine by now
        action = await legs.after(leg, failure, instance, flow)
        self.again = leg is Leg.PREFILL and action is Action.SAME_INSTANCE
        if leg is Leg.PREFILL and failure.failure is Failure.TIMEOUT and self._contract.prefill_waits and flow.decoder:
            flow.avoid.add(flow.decoder)  # either may be the one that hangs
            legs.let_go_of_decoder(flow)
        if leg is Leg.DECODE:
            legs.let_go_of_decoder(flow)
        legs.give_kv_back(flow)

    def _told_by_abort(self) -> None:
        """A decoder that is aborted while it waits for KV has the prefiller free it (kv-contracts section 2.2)."""
        flow, ledger = self._flow, self._legs.ledger
        if flow.entry is not None and flow.dispatched:
            ledger.move(flow.entry, KvState.RECLAIMING)
            ledger.move(flow.entry, KvState.RECLAIMED)
            flow.entry = None

"""The story of a request: reserve, prefill, hand over, decode, relay. What follows from a failure is `retry.TABLE`'s.

Every leg is one attempt at one instance. A client that leaves cancels the coroutine; whatever point it is at, loads
give themselves back, KV that was handed out is consumed or reclaimed, and no connection is left waiting.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from time import monotonic

from proxy import sse
from proxy.answering import relay, send_error, send_whole
from proxy.config import ProxyConfig
from proxy.contracts import Contract
from proxy.errors import BadRequest, Failure, NoInstance, ProxyError, UpstreamFailure
from proxy.flow import Flow
from proxy.frontend import ClientConnection
from proxy.http1 import RequestHead
from proxy.instance import Fleet, Instance, Role
from proxy.kv_ledger import KvLedger, KvState
from proxy.openai_api import ROUTES, parse_call
from proxy.reclaim import Reclaimer
from proxy.report import Reporter
from proxy.retry import TABLE, Action, Budget, Leg
from proxy.scheduling import Policy
from proxy.scheduling.candidate import candidates
from proxy.scheduling.cost import cost_of
from proxy.upstream import Answer, UpstreamConnection

log = logging.getLogger(__name__)

HANG_UP_S = 5.0  # how long an abandoned prefill is listened to, for the KV it may still hand out


class PassOn(Exception):
    """An instance's own answer is the answer: its status, its body."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Dispatcher:
    def __init__(
        self,
        config: ProxyConfig,
        contract: Contract,
        policy: Policy,
        fleet: Fleet,
        ledger: KvLedger,
        reclaimer: Reclaimer,
        reporter: Reporter,
        loop: asyncio.AbstractEventLoop,
        bearer_line: bytes,
    ) -> None:
        self._config = config
        self._contract = contract
        self._policy = policy
        self._fleet = fleet
        self._ledger = ledger
        self._reclaimer = reclaimer
        self._reporter = reporter
        self._loop = loop
        self._bearer_line = bearer_line
        self._ids = itertools.count(1)
        self._id_prefix = uuid.uuid4().hex[:20]
        self.open: set[Flow] = set()

    def serve(self, client: ClientConnection, head: RequestHead, body: bytes) -> asyncio.Task[None]:
        request_id = head.request_id or f"{self._id_prefix}-{next(self._ids):x}"
        budget = Budget(self._config.max_retries, self._config.retry_delay)
        flow = Flow(client, head, ROUTES[head.path], request_id, budget, monotonic())
        return self._loop.create_task(self._serve(flow, body))

    async def _serve(self, flow: Flow, body: bytes) -> None:
        """The story within its frame: whatever happens, the client is answered or gone, and nothing stays open."""
        self.open.add(flow)
        try:
            await self._story(flow, body)
        except asyncio.CancelledError:
            flow.outcome = "client_gone"
            raise
        except PassOn as passed:
            flow.outcome = "upstream_error"
            send_whole(flow, passed.answer)
        except ProxyError as error:
            send_error(flow, error)
        except Exception:  # the last resort: a bug of ours must not leave a client without an answer
            log.exception("event=internal_error request_id=%s", flow.request_id)
            send_error(flow, ProxyError(500, "Internal error in the proxy.", error_type="internal_server_error"))
        finally:
            flow.release_loads()
            self._give_kv_back(flow)
            self.open.discard(flow)
            self._reporter.ended(flow, monotonic())

    async def _story(self, flow: Flow, body: bytes) -> None:
        flow.call = call = parse_call(flow.route, body)
        if call.own_kv_transfer_params and not self._config.allow_client_kv_transfer_params:
            raise BadRequest("'kv_transfer_params' is not accepted from clients.", "kv_transfer_params")
        flow.stream = call.stream
        flow.cost = cost_of(call)
        flow.forwarded = flow.head.forwarded
        if self._bearer_line and not flow.head.authorization:
            flow.forwarded += self._bearer_line
        split = not call.own_kv_transfer_params and self._contract.splits(call)
        if not split:
            several = "list_of_prompts" if call.num_prompts > 1 else "nothing_to_decode"
            self._reporter.recompute("own_kv_transfer_params" if call.own_kv_transfer_params else several)
        self._reserve_decoder(flow)  # before the prefill: a prompt nobody can decode is not worth computing
        while True:
            if split and not flow.prefilled:
                await self._prefill(flow)
            answer = await self._decode(flow)
            if answer is not None:
                break
        if answer.complete:
            flow.outcome = "ok"
            send_whole(flow, answer)
        else:
            await relay(flow, answer, self._config.between_tokens_timeout_s, self._reporter)

    # --- the two legs

    async def _prefill(self, flow: Flow) -> None:
        """Leaves the KV in `flow.entry`, or none if the prefiller gave none. Raises ProxyError or PassOn."""
        body = self._contract.prefill_body(flow.call)
        fresh = False
        while True:
            instance = flow.prefiller = (
                flow.prefiller if fresh and flow.prefiller else self._pick(Role.PREFILL, flow, flow.cost.prefill_tokens)
            )
            flow.prefill_load = load = instance.load.reserve(flow.cost.prefill_tokens)
            flow.budget.spend(Leg.PREFILL)
            flow.prefill_attempts += 1
            began = monotonic()
            flow.sent_at = flow.sent_at or began
            try:
                answer = await self._exchange(flow, instance, body, Leg.PREFILL, fresh)
                kv = self._kv_of(answer, instance)
            except UpstreamFailure as failure:
                fresh = await self._after(Leg.PREFILL, failure, instance, flow) is Action.SAME_INSTANCE
                continue
            finally:
                load.release()
            flow.prefilled = True
            flow.prefilled_at = now = monotonic()
            instance.load.observe(load.num_tokens + load.ahead, now - began)
            self._reporter.prefilled(now - began)
            if kv is None:
                self._reporter.recompute("prefiller_gave_no_kv")
            else:
                flow.entry = self._ledger.hand_out(flow.upstream_id, instance.key, kv, now)
            return

    async def _decode(self, flow: Flow) -> Answer | None:
        """One attempt. None means: failed, try again as `flow` stands now. Raises ProxyError or PassOn."""
        if flow.decoder is None:
            self._reserve_decoder(flow)
        instance = flow.decoder
        assert instance is not None
        body = self._contract.decode_body(flow.call, flow.kv)
        flow.budget.spend(Leg.DECODE)
        flow.sent_at = flow.sent_at or monotonic()
        try:
            answer = await self._exchange(flow, instance, body, Leg.DECODE, False)
        except UpstreamFailure as failure:
            action = await self._after(Leg.DECODE, failure, instance, flow)
            self._let_go_of_decoder(flow)
            if action is Action.PREFILL_AGAIN:
                self._give_kv_back(flow)
                flow.prefilled = False
            return None
        flow.first_event_at = monotonic()
        if flow.entry is not None:
            self._ledger.move(flow.entry, KvState.CONSUMED)
            flow.entry = None
        return answer

    async def _exchange(self, flow: Flow, instance: Instance, body: bytes, leg: Leg, fresh: bool) -> Answer:
        """One request to one instance. Returns its 2xx answer; anything else raises UpstreamFailure."""
        pool = instance.pool
        connection = (None if fresh else pool.take_idle()) or await pool.connect()
        if instance.health.num_failures:
            instance.health.succeeded()
        if leg is Leg.DECODE and flow.entry is not None:
            flow.entry.dispatched = True
        head = b"POST %b HTTP/1.1\r\n%b%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n" % (
            flow.head.target,
            pool.host_line,
            flow.forwarded,
            flow.upstream_id.encode("ascii"),
            len(body),
        )
        config = self._config
        timeout_s = config.prefill_timeout_s if leg is Leg.PREFILL else config.first_token_timeout_s
        streams = leg is Leg.DECODE and flow.call.stream
        waiter = connection.send(head, body, first_event_only=streams, deadline=monotonic() + timeout_s)
        try:
            answer = await waiter
        except asyncio.CancelledError:
            self._leave(flow, instance, connection, waiter, leg)
            raise
        except UpstreamFailure as failure:
            if failure.failure is Failure.TIMEOUT:
                self._leave(flow, instance, connection, waiter, leg)
            raise
        status = answer.head.status
        if status >= 300:
            if not answer.complete:
                connection.close()
            kind = Failure.SERVER_ERROR if status >= 500 else Failure.CLIENT_ERROR
            raise UpstreamFailure(kind, f"{instance.key} answered {status}", answer)
        if streams and answer.first_event is not None and (error := sse.error_of(answer.first_event)) is not None:
            if not answer.complete:
                connection.close()
            kind = Failure.CLIENT_ERROR if error[0] < 500 else Failure.ERROR_EVENT
            raise UpstreamFailure(kind, f"{instance.key} streamed an error", answer.as_error(*error))
        return answer

    def _leave(
        self,
        flow: Flow,
        instance: Instance,
        connection: UpstreamConnection,
        waiter: asyncio.Future[Answer],
        leg: Leg,
    ) -> None:
        """Nobody waits for `connection` any more. A prefill may still hand KV out, which then has to be given back."""
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            answer = waiter.result()
            if leg is Leg.PREFILL:
                self._late_answer(flow, instance, answer)
            elif not answer.complete:
                connection.close()
            return
        if leg is Leg.PREFILL:
            self._hang_up(flow, instance, connection)
        else:
            connection.close()

    def _hang_up(self, flow: Flow, instance: Instance, connection: UpstreamConnection) -> None:
        connection.hang_up(lambda answer: self._late_answer(flow, instance, answer), monotonic() + HANG_UP_S)

    def _late_answer(self, flow: Flow, instance: Instance, answer: Answer) -> None:
        try:
            kv = self._kv_of(answer, instance) if answer.status < 300 else None
        except UpstreamFailure:
            return
        if kv is not None:
            entry = self._ledger.hand_out(flow.upstream_id, instance.key, kv, monotonic())
            self._reclaimer.give_back(entry, flow.call, flow.head.target, flow.forwarded)

    # --- choosing, and what follows from a failure

    def _pick(self, role: Role, flow: Flow, num_tokens: int) -> Instance:
        """Filter, score, pick; the caller reserves before it awaits anything."""
        now = monotonic()
        fit = candidates(self._fleet.members[role], flow.avoid, now)
        if not fit:
            raise NoInstance(role.value, "none is enabled")
        instance = self._policy.pick(fit, num_tokens)
        self._fleet.picked(instance)
        if not instance.health.healthy:
            instance.health.begin_trial(now)
        return instance

    def _reserve_decoder(self, flow: Flow) -> None:
        flow.decoder = self._pick(Role.DECODE, flow, flow.cost.decode_tokens)
        flow.decode_load = flow.decoder.load.reserve(flow.cost.decode_tokens)

    def _let_go_of_decoder(self, flow: Flow) -> None:
        if flow.decode_load is not None:
            flow.decode_load.release()
        flow.decoder = flow.decode_load = None

    async def _after(self, leg: Leg, failure: UpstreamFailure, instance: Instance, flow: Flow) -> Action:
        """Note the failure, wait as the table says, return the action. With none left, raises the client's answer."""
        kind = failure.failure
        action, delay_s = flow.budget.decide(leg, kind)
        row = TABLE[leg, kind]
        self._reporter.failed(flow, leg, instance, failure, action)
        if row.unwell and instance.health.failed(monotonic(), failure.message):
            self._reporter.went_out(instance)
        if action in (Action.PASS_ON, Action.FAIL):
            if isinstance(failure.answer, Answer):
                raise PassOn(failure.answer)
            raise ProxyError(
                row.status,
                f"The {leg.value} instance failed: {failure.message}.",
                error_type="service_unavailable" if row.status == 503 else "upstream_error",
                retry_after_s=1 if row.status == 503 else None,
            )
        if action is not Action.SAME_INSTANCE and kind is not Failure.STALE:
            flow.avoid.add(instance)
        if delay_s:
            await asyncio.sleep(delay_s)
        return action

    def _kv_of(self, answer: Answer, instance: Instance) -> dict[str, object] | None:
        try:
            return self._contract.kv_of(answer.body)
        except ValueError as error:
            raise UpstreamFailure(Failure.GARBAGE, f"{instance.key}: {error}") from None

    def _give_kv_back(self, flow: Flow) -> None:
        entry, flow.entry = flow.entry, None
        if entry is not None:
            self._reclaimer.give_back(entry, flow.call, flow.head.target, flow.forwarded)

"""One leg of a request: one exchange with one instance, and what is done with what becomes of it.

A leg reserves load before it awaits anything and gives it back whatever happens; KV that was handed out is consumed or
reclaimed; a connection nobody waits for any more is closed, or listened to for the KV it may still hand out. What
follows from a failure is `retry.TABLE`'s. In which order legs run is a story's (`proxy/stories`).
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from time import monotonic

from proxy import sse
from proxy.answer import Answer
from proxy.answer_id import renamed
from proxy.bootstrap import Bootstrap
from proxy.config import ProxyConfig
from proxy.contracts import Contract
from proxy.errors import Failure, NoInstance, ProxyError, UpstreamFailure
from proxy.flow import Flow
from proxy.instance import Fleet, Instance, Role
from proxy.kv_ledger import KvLedger
from proxy.load_ledger import Reservation
from proxy.long_body import Body
from proxy.metaserver import Metaserver
from proxy.prompt_facts import cached_tokens_of, prompt_tokens_of, says_usage
from proxy.reclaim import Reclaimer
from proxy.report import Reporter
from proxy.retry import TABLE, Action, Evidence, Leg
from proxy.scheduling import Policy
from proxy.scheduling.candidate import candidates
from proxy.upstream import UpstreamConnection

USAGE_WAIT_S = 0.2  # how long a whole answer is held for what its prefiller, which was quicker, says of the prompt
HANG_UP_S = 5.0  # how long an abandoned prefill is listened to, for the KV it may still hand out


class PassOn(Exception):
    """An instance's own answer is the answer: its status, its body."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Legs:
    def __init__(
        self,
        config: ProxyConfig,
        contract: Contract,
        policies: Mapping[Role, Policy],
        fleet: Fleet,
        ledger: KvLedger,
        reclaimer: Reclaimer,
        reporter: Reporter,
        bootstrap: Bootstrap,
        metaserver: Metaserver,
    ) -> None:
        self.config = config
        self.contract = contract
        self.ledger = ledger
        self.reporter = reporter
        self.bootstrap = bootstrap
        self.metaserver = metaserver
        self._explains = reporter.explains
        self._policies = policies
        self._fleet = fleet
        self._reclaimer = reclaimer
        self._running: set[asyncio.Task[None]] = set()

    def speaking(self, contract: Contract) -> Legs:
        """The same legs under another contract; requests under way keep theirs."""
        other = copy.copy(self)
        other.contract = contract
        return other

    def let_run(self, prefill: asyncio.Task[None]) -> None:
        """A prefill whose decoder has answered already: its own answer, or its failure, matters to its load only."""
        self._running.add(prefill)
        prefill.add_done_callback(self._has_run)

    def _has_run(self, prefill: asyncio.Task[None]) -> None:
        self._running.discard(prefill)
        if not prefill.cancelled():
            prefill.exception()

    async def exchange(
        self,
        flow: Flow,
        instance: Instance,
        body: Body,
        leg: Leg,
        fresh: bool,
        lines: bytes = b"",
        more_s: float = 0.0,
    ) -> Answer:
        """One request to one instance; `lines` are header lines for it, and it has `more_s` longer than its leg's
        time-out says. Returns its 2xx answer; anything else raises UpstreamFailure."""
        pool = instance.pool
        connection = (None if fresh else pool.take_idle()) or await pool.connect()
        if leg is Leg.DECODE:
            flow.dispatched = True
            if flow.entry is not None:
                flow.entry.dispatched = True
        leg_id = flow.upstream_id
        head = b"POST %b HTTP/1.1\r\n%b%b%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n" % (
            flow.target,
            pool.host_line,
            flow.forwarded,
            lines,
            leg_id.encode("ascii"),
            len(body),
        )
        config = self.config
        timeout_s = config.prefill_timeout_s if leg is Leg.PREFILL else config.first_token_timeout_s
        streams = leg is Leg.DECODE and flow.call.stream
        waiter = connection.send(head, body, first_event_only=streams, now=monotonic(), timeout_s=timeout_s + more_s)
        if leg is Leg.DECODE:
            flow.decoding = connection
        try:
            answer = await waiter
        except asyncio.CancelledError:
            self._leave(flow, instance, connection, waiter, leg)
            raise
        except UpstreamFailure as failure:
            if failure.failure in (Failure.TIMEOUT, Failure.INSTANCE_OUT):
                self._leave(flow, instance, connection, waiter, leg)
            raise
        finally:
            if leg is Leg.DECODE:
                flow.decoding = None
        status = answer.head.status
        if instance.health.doubted and status < 500:
            self._answered(instance)
        if status >= 300:
            if not answer.complete:
                connection.close()
            kind = Failure.SERVER_ERROR if status >= 500 else Failure.CLIENT_ERROR
            raise UpstreamFailure(kind, f"{instance.key} answered {status}", answer)
        if streams and answer.first_event is not None and (error := sse.error_of(answer.first_event, flow.route)):
            if not answer.complete:
                connection.close()
            kind = Failure.CLIENT_ERROR if error[0] < 500 else Failure.ERROR_EVENT
            raise UpstreamFailure(kind, f"{instance.key} streamed an error", answer.as_error(*error))
        if leg is Leg.DECODE:
            if flow.prefill_hold is not None:
                flow.prefill_hold.release()
            if leg_id is not flow.request_id and answer.complete:
                return answer.with_body(renamed(answer.body, leg_id, flow.request_id))
        return answer

    @property
    def prefill_s(self) -> float:
        """The longest that one attempt at a prefill may take."""
        return self.config.connect_timeout_s + self.config.prefill_timeout_s

    def decoder_waits(self, flow: Flow, more_s: float = 0.0) -> None:
        """The decode leg under way has its time-out, and `more_s`, from now on: it waits for a prefill, or no more."""
        if flow.decoding is not None:
            flow.decoding.deadline = monotonic() + self.config.first_token_timeout_s + more_s

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
                self._late_answer(flow, instance, answer, flow.promised)
            elif not answer.complete:
                connection.close()
            return
        if leg is Leg.PREFILL:
            self._hang_up(flow, instance, connection)
        else:
            connection.close()

    def _hang_up(self, flow: Flow, instance: Instance, connection: UpstreamConnection) -> None:
        promised = flow.promised
        connection.hang_up(lambda answer: self._late_answer(flow, instance, answer, promised), monotonic() + HANG_UP_S)

    def _late_answer(self, flow: Flow, instance: Instance, answer: Answer, promised: dict[str, object] | None) -> None:
        try:
            if answer.status >= 300:
                return
            kv = self.kv_of(answer, instance) if promised is None else promised
        except UpstreamFailure:
            return
        if kv is not None:
            entry = self.ledger.hand_out(flow.upstream_id, instance.key, kv, monotonic())
            self._reclaimer.give_back(entry, self.contract, flow.call, flow.target, flow.forwarded)

    # --- choosing, and what follows from a failure

    def pick(self, role: Role, flow: Flow, num_tokens: int) -> Instance:
        """Filter, score, pick; the caller reserves before it awaits anything."""
        return self._choose(role, flow, self._candidates(role, flow), num_tokens)

    def _candidates(self, role: Role, flow: Flow) -> Sequence[Instance]:
        fleet = self._fleet
        if fleet.board is not None:
            fleet.board.look(fleet.members[role])
        fit = candidates(fleet.members[role], flow.avoid, monotonic())
        if not fit:
            raise NoInstance(role.value, "none is enabled")
        return fit

    def _choose(self, role: Role, flow: Flow, fit: Sequence[Instance], num_tokens: int) -> Instance:
        policy = self._policies[role]
        instance = policy.pick(fit, num_tokens, flow)
        if self._explains:
            reason = policy.reason(fit, instance, num_tokens)
            if role is Role.PREFILL:
                flow.prefill_reason = reason
            else:
                flow.decode_reason = reason
        if policy.holds:
            flow.hold(role, policy.hold(instance.load, flow))
        self._fleet.picked(instance)
        if not instance.health.healthy:
            instance.health.begin_trial(monotonic())
        return instance

    def reserve_prefiller(self, flow: Flow, same: bool) -> tuple[Instance, Reservation]:
        """Reserve the `same` prefiller as before, or one that is picked, for one more attempt."""
        num_tokens = flow.cost.prefill_tokens
        if not same or flow.prefiller is None:
            flow.prefiller = self.pick(Role.PREFILL, flow, num_tokens)
        flow.prefill_load = load = flow.prefiller.load.reserve(num_tokens)
        flow.budget.spend(Leg.PREFILL)
        return flow.prefiller, load

    def prefilled(self, instance: Instance, load: Reservation, began: float) -> float:
        """A prefill has ended well: note how long it took. Returns the time."""
        now = monotonic()
        instance.load.observe_queue(load.num_tokens, began, now)
        self.reporter.prefilled(now - began)
        return now

    def note_usage(self, flow: Flow, prefill_answer: bytes) -> None:
        """What a prefill that runs beside its decode says of the prompt. That of a continuation counts what was
        generated as prompt: the first one's word stands."""
        if flow.continuation is None and says_usage(prefill_answer):
            flow.note_prefill_usage(prompt_tokens_of(prefill_answer), cached_tokens_of(prefill_answer, None))

    async def let_finish(self, prefill: asyncio.Task[None], answer: Answer) -> None:
        """The decoder has all of the KV. Where its answer is whole already, what the prefiller says of the prompt is
        waited for a moment; for all else, and if it fails, the prefill goes on by itself."""
        self.let_run(prefill)
        if answer.complete and says_usage(answer.raw):
            await asyncio.wait({prefill}, timeout=USAGE_WAIT_S)

    def reserve_decoder(self, flow: Flow, only_with_room: bool = False) -> bool:
        """Reserve a decoder that has room for the request's KV. Where none has: any, or none and False."""
        cost = flow.cost
        fit = self._candidates(Role.DECODE, flow)
        roomy = [one for one in fit if one.load.has_room(cost.kv_tokens)]
        if not roomy and only_with_room:
            return False
        flow.decoder = decoder = self._choose(Role.DECODE, flow, roomy or fit, cost.decode_tokens)
        flow.decode_load = decoder.load.reserve(cost.decode_tokens, cost.kv_tokens)
        return True

    def let_go_of_decoder(self, flow: Flow) -> None:
        if flow.decode_load is not None:
            flow.decode_load.release()
        if flow.decode_hold is not None:
            flow.decode_hold.release()
        flow.decoder = flow.decode_load = flow.decode_hold = None

    async def after(self, leg: Leg, failure: UpstreamFailure, instance: Instance, flow: Flow) -> Action:
        """Note the failure, wait as the table says, return the action. With none left, raises the client's answer."""
        kind = failure.failure
        action, delay_s = flow.budget.decide(leg, kind)
        row = TABLE[leg, kind]
        self.reporter.failed(flow, leg, instance, failure, action)
        self._weigh(instance, row.evidence, failure, flow)
        if action in (Action.PASS_ON, Action.FAIL):
            if isinstance(failure.answer, Answer):
                raise PassOn(failure.answer)
            raise ProxyError(
                row.status,
                f"The {leg.value} instance failed: {failure.message}.",
                error_type="ServiceUnavailableError" if row.status == 503 else "upstream_error",
                retry_after_s=1 if row.status == 503 else None,
            )
        if action is not Action.SAME_INSTANCE and kind is not Failure.STALE:
            flow.avoid.add(instance)
        if delay_s:
            await asyncio.sleep(delay_s)
        return action

    def _weigh(self, instance: Instance, evidence: Evidence, failure: UpstreamFailure, flow: Flow) -> None:
        """What a failure says about the instance."""
        health, went_out = instance.health, False
        if evidence is Evidence.CONNECTION:
            went_out = health.failed(monotonic(), failure.message)
        elif evidence is Evidence.REQUEST and not _is_about_kv(failure):
            went_out = health.request_failed(monotonic(), failure.message, flow.request_id)
        if went_out:
            self.reporter.went_out(instance)

    def _answered(self, instance: Instance) -> None:
        if instance.health.answered():
            instance.load.forget()
            self.reporter.came_back(instance)

    def kv_of(self, answer: Answer, instance: Instance) -> dict[str, object] | None:
        try:
            return self.contract.kv_of(answer.body)
        except ValueError as error:
            raise UpstreamFailure(Failure.GARBAGE, f"{instance.key}: {error}") from None

    def give_kv_back(self, flow: Flow) -> None:
        entry, flow.entry = flow.entry, None
        if entry is not None:
            self._reclaimer.give_back(entry, self.contract, flow.call, flow.target, flow.forwarded)


def _is_about_kv(failure: UpstreamFailure) -> bool:
    """Whether the engine says that the KV it was sent for is gone: that is not its own fault."""
    return isinstance(failure.answer, Answer) and b"kv_load_error" in failure.answer.raw

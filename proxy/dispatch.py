"""The story of a request, in its frame: read, admitted, told (`proxy/stories`), answered.

A client that leaves cancels the coroutine; whatever point it is at, loads give themselves back, KV that was handed out
is consumed or reclaimed, and no connection is left waiting.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import uuid
from time import monotonic

from proxy import server_timing
from proxy.admission import Admission
from proxy.answer import Answer
from proxy.answering import send_error, send_whole
from proxy.children import Family
from proxy.config import ProxyConfig
from proxy.contracts import Contract
from proxy.downstream import Downstream
from proxy.errors import BadRequest, Failure, ProxyError
from proxy.flow import Flow
from proxy.frontend import ClientConnection
from proxy.http1 import RequestHead
from proxy.keep_alive import KeepAlive
from proxy.legs import Legs, PassOn
from proxy.openai_api import ROUTES, parse_call
from proxy.prompt_facts import with_cached_tokens, with_scored_prompt
from proxy.relay_thread import RelayThread
from proxy.relaying import Relayer
from proxy.report import Reporter
from proxy.retry import Budget
from proxy.scheduling.cost import cost_of
from proxy.stories import STORIES

log = logging.getLogger(__name__)


class Dispatcher:
    def __init__(
        self,
        config: ProxyConfig,
        legs: Legs,
        admission: Admission,
        reporter: Reporter,
        loop: asyncio.AbstractEventLoop,
        bearer_line: bytes,
    ) -> None:
        self._config = config
        self._legs = legs
        self._admission = admission
        self._contract = legs.contract
        self._tell = STORIES[legs.contract.order]
        self._reporter = reporter
        self._relayer = Relayer(config, legs, self._tell, reporter)
        self._relay_thread: RelayThread | None = None
        self._loop = loop
        self._timing = server_timing.levels(config.server_timing, config.server_timing_instances)
        self._bearer_line = bearer_line
        self._ids = itertools.count(1)
        self._id_prefix = uuid.uuid4().hex[:20]
        self._given_ids: set[str] = set()
        """By clients, of requests that are open."""
        self.open: set[Flow] = set()
        self._out_of_time_flows: set[Flow] = set()

    def speak(self, contract: Contract) -> None:
        """Requests from now on go by `contract`; those under way keep theirs."""
        self._legs = self._legs.speaking(contract)
        self._contract = contract
        self._tell = STORIES[contract.order]
        self.relay_by(self._relay_thread)

    def relay_by(self, thread: RelayThread | None) -> None:
        """Lend the streams that begin from now on to `thread`."""
        self._relay_thread = thread
        self._relayer = Relayer(self._config, self._legs, self._tell, self._reporter, thread)

    def serve(self, client: ClientConnection, head: RequestHead, body: bytes) -> asyncio.Task[None]:
        request_id = head.request_id or f"{self._id_prefix}-{next(self._ids):x}"
        head.server_timing = self._timing[head.server_timing]
        flow = self._flow(client, head, request_id)
        task = self._start(flow, body)
        if head.request_id:
            if request_id in self._given_ids:  # engines find requests, and their KV, by it
                flow.engine_id = f"{request_id}-{secrets.token_hex(8)}"
            else:
                self._given_ids.add(request_id)
                task.add_done_callback(lambda _: self._given_ids.discard(request_id))
        if self._config.total_timeout_s:
            timer = self._loop.call_later(self._config.total_timeout_s, self._out_of_time, flow, task)
            task.add_done_callback(lambda _: timer.cancel())
        return task

    def _flow(self, client: Downstream, head: RequestHead, request_id: str) -> Flow:
        budget = Budget(self._config.max_retries, self._config.retry_delay)
        return Flow(client, head, ROUTES[head.path], request_id, budget, monotonic())

    def _start(self, flow: Flow, body: bytes) -> asyncio.Task[None]:
        return self._loop.create_task(self._serve(flow, body))

    def _out_of_time(self, flow: Flow, task: asyncio.Task[None]) -> None:
        """The request's own limit has passed: what is open is ended, and the client told."""
        relayed = flow.headers_sent and flow.client.end_relay(Failure.OUT_OF_TIME)
        if not relayed and not task.done():  # nothing was begun, or it waits for the rest of what was
            self._out_of_time_flows.add(flow)
            task.cancel()

    async def _serve(self, flow: Flow, body: bytes) -> None:
        """Whatever happens, the client is answered or gone, and nothing stays open."""
        self.open.add(flow)
        legs, tell, relayer = self._legs, self._tell, self._relayer
        try:
            self._read(flow, body)
            if self._config.keepalive_interval and flow.stream and not flow.is_child:
                flow.keep_alive = KeepAlive(flow, self._config.keepalive_interval, self._loop)
            if flow.divided:
                await Family(flow, self._flow, self._start).answer()
                flow.client.answered(close=flow.close)
                return
            await self._admission.admit(flow)  # before the prefill: a prompt nobody can decode is not worth computing
            answer = await tell(flow, legs)
            streams = answer.head.event_stream
            look = answer.complete and relayer.must_look(flow, answer)
            if look and not streams:
                answer = await relayer.whole(flow, answer)
                look = False
            if flow.headers_sent and not streams:
                raise _no_stream(answer)
            if answer.complete and not look and not flow.headers_sent:
                flow.outcome = "ok"
                answer = told_of_prompt(flow, answer)
                self._reporter.whole(flow, answer)
                send_whole(flow, answer)
            else:
                await relayer.relay(flow, answer)
        except asyncio.CancelledError:
            if flow not in self._out_of_time_flows or flow.client.transport.is_closing():
                if flow.outcome != "ok":  # or it has all of its answer, and its children are only being ended
                    flow.outcome = "client_gone"
                raise
            send_error(flow, ProxyError(504, "Not answered in time (--total-timeout-s).", error_type="timeout"))
        except PassOn as passed:
            flow.outcome = "upstream_error"
            send_whole(flow, passed.answer)
        except ProxyError as error:
            send_error(flow, error)
        except Exception:  # the last resort: a bug of ours must not leave a client without an answer
            log.exception("event=internal_error request_id=%s", flow.request_id)
            send_error(flow, ProxyError(500, "Internal error in the proxy.", error_type="InternalServerError"))
        finally:
            flow.stop_keep_alive()
            flow.release_loads()
            legs.give_kv_back(flow)
            self.open.discard(flow)
            self._out_of_time_flows.discard(flow)
            self._reporter.ended(flow, monotonic())

    def _read(self, flow: Flow, body: bytes) -> None:
        """What the request is, what it costs, and whether it is split at all. Raises BadRequest."""
        flow.call = call = parse_call(flow.route, body)
        if call.own_kv_transfer_params and not self._config.allow_client_kv_transfer_params:
            raise BadRequest("'kv_transfer_params' is not accepted from clients.", "kv_transfer_params")
        if call.own_bootstrap and not self._config.allow_client_kv_transfer_params:
            raise BadRequest(f"'{call.own_bootstrap}' is not accepted from clients.", call.own_bootstrap)
        flow.stream = call.stream
        flow.cost = cost_of(call)
        flow.forwarded = flow.head.forwarded
        if self._bearer_line and not flow.head.authorization:
            flow.forwarded += self._bearer_line
        if call.own_kv_transfer_params:
            self._alone(flow, "own_kv_transfer_params")
        elif call.num_prompt_tokens // call.num_prompts < self._config.min_remote_prefill_tokens:
            self._alone(flow, "short_prompt")
        elif self._contract.takes_whole(call):
            if not self._contract.splits(call):
                self._alone(flow, "nothing_to_decode")
        elif call.indivisible or call.max_new_tokens == 0:
            self._alone(flow, call.indivisible or "nothing_to_decode")
        elif call.num_prompts * call.num_choices > self._config.max_children:
            if not self._contract.decodes_alone:
                raise BadRequest(f"'n' and 'prompt' make more than {self._config.max_children} answers.", "n")
            self._alone(flow, "too_many_children")
        else:
            flow.divided = True

    def _alone(self, flow: Flow, reason: str) -> None:
        """The decoder computes the prompt itself."""
        flow.split = False
        self._reporter.recompute(reason)


def _no_stream(answer: Answer) -> ProxyError:
    if not answer.complete:
        answer.connection.close()
    return ProxyError(502, "The decode instance answered a stream with something else.", error_type="upstream_error")


def told_of_prompt(flow: Flow, answer: Answer) -> Answer:
    """The decoder's whole answer with what the prefiller alone knows of the prompt; the same where there is nothing."""
    if flow.cached_tokens is None and flow.scored_prompt is None:
        return answer
    given = body = answer.body
    if flow.scored_prompt is not None:
        try:
            body = with_scored_prompt(flow.call, flow.scored_prompt, body)
        except ValueError as error:
            raise ProxyError(502, f"The answers cannot be joined: {error}.", error_type="upstream_error") from None
    if flow.cached_tokens is not None:
        body = with_cached_tokens(body, flow.cached_tokens)
    if body is given:
        return answer
    answer.head.chunked = False
    return Answer(answer.connection, answer.head, body, True, None)

"""One request on its way through: what dispatch knows of it, and everything it must give back when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proxy.continuation import Continuation
from proxy.downstream import Downstream
from proxy.http1 import RequestHead
from proxy.instance import Instance, Role
from proxy.kv_ledger import KvEntry
from proxy.load_ledger import Hold, Reservation
from proxy.openai_api import ApiCall
from proxy.retry import Budget
from proxy.scheduling import Prefix
from proxy.scheduling.cost import Cost
from proxy.scheduling.policy import Reason
from proxy.scheduling.prefix_affinity import prefix_of
from proxy.scheduling.session import session_key_of

if TYPE_CHECKING:
    from proxy.client_stream import ClientStream
    from proxy.keep_alive import KeepAlive
    from proxy.upstream import UpstreamConnection


class Flow:
    """Times are of the monotonic clock, in seconds; zero means "not reached"."""

    __slots__ = (
        "_prefix",
        "arrived",
        "avoid",
        "budget",
        "cached_tokens",
        "call",
        "children",
        "client",
        "close",
        "continuation",
        "cost",
        "decode_hold",
        "decode_load",
        "decode_reason",
        "decoder",
        "decoding",
        "dispatched",
        "divided",
        "engine_id",
        "entry",
        "first_event_at",
        "forwarded",
        "head",
        "headers_sent",
        "is_child",
        "keep_alive",
        "leg_id",
        "num_chunks",
        "num_lent_chunks",
        "num_output_tokens",
        "outcome",
        "prefill_attempts",
        "prefill_hold",
        "prefill_load",
        "prefill_reason",
        "prefilled",
        "prefilled_at",
        "prefiller",
        "promised",
        "prompt_tokens",
        "relayed",
        "request_id",
        "route",
        "scored_prompt",
        "sent_at",
        "split",
        "status",
        "stream",
        "target",
    )

    def __init__(
        self, client: Downstream, head: RequestHead, route: str, request_id: str, budget: Budget, arrived: float
    ) -> None:
        self.client = client
        self.head = head
        self.target = head.target
        """Where the call is sent; the client's, unless a continuation is a completion."""
        self.route = route
        self.request_id = request_id
        self.engine_id = request_id
        """What engines are told it is; another than the client's where that one is another request's at the time."""
        self.budget = budget
        self.arrived = arrived
        self.close = not head.keep_alive or head.version == "1.0"
        self.call: ApiCall
        self.cost: Cost
        self.forwarded = b""
        self.prefiller: Instance | None = None
        self.decoder: Instance | None = None
        self.decoding: UpstreamConnection | None = None
        """That of the decode leg, until its answer has come or begun."""
        self.prefill_load: Reservation | None = None
        self.decode_load: Reservation | None = None
        self.prefill_hold: Hold | None = None
        self.decode_hold: Hold | None = None
        self.entry: KvEntry | None = None
        self.cached_tokens: int | None = None
        """Of the prompt, those the prefiller found in its caches; None if no prefiller computed it."""
        self.scored_prompt: bytes | None = None
        """The prefiller's answer, where it has the logprobs of the prompt that the client asked for."""
        self.leg_id = ""
        """The X-Request-Id of both legs where the contract mints it."""
        self.dispatched = False
        """Whether the latest decode leg reached its instance."""
        self.promised: dict[str, Any] | None = None
        """By what the KV can be had that a prefill still under way will leave, where its answer doesn't say."""
        self.split = True
        self.divided = False
        """Whether its children are prefilled and decoded in its place."""
        self.prefilled = False
        self.prefill_attempts = 0
        self.avoid: set[Instance] = set()
        self.headers_sent = False
        self.keep_alive: KeepAlive | None = None
        """Who tells the client that its stream will come; None if nobody does, or when the stream has begun."""
        self.is_child = False
        self.children: Sequence[Flow] = ()
        self.stream = False
        self.status = 0
        self.outcome = "error"
        self.sent_at = 0.0
        self.prefilled_at = 0.0
        self.first_event_at = 0.0
        self.num_chunks = 0
        self.num_lent_chunks = 0
        self.num_output_tokens: int | None = None
        """Of an answer that came whole, looked up for the access log only."""
        self.prefill_reason: Reason | None = None
        self.decode_reason: Reason | None = None
        self._prefix: Prefix | None = None
        self.prompt_tokens: int | None = None
        """As the first prefill's answer counts them."""
        self.continuation: Continuation | None = None
        self.relayed: ClientStream | None = None
        """The client's stream, once it has begun."""

    @property
    def kv(self) -> dict[str, Any] | None:
        return self.entry.kv if self.entry is not None else None

    @property
    def upstream_id(self) -> str:
        """The X-Request-Id of both legs. A prefill that is repeated gets a new one: the engine may know the old."""
        if self.leg_id:
            return self.leg_id
        return self.engine_id if self.prefill_attempts <= 1 else f"{self.engine_id}-{self.prefill_attempts}"

    @property
    def id_lines(self) -> bytes:
        return self.head.id_lines(self.request_id)

    # what a policy may ask (`scheduling.Ask`)

    @property
    def body_bytes(self) -> int:
        return len(self.call.body)

    @property
    def session_key(self) -> bytes:
        return session_key_of(self.head.lines, self.call.outline)

    @property
    def prefix(self) -> Prefix:
        if self._prefix is None:
            self._prefix = prefix_of(self.call)
        return self._prefix

    def hold(self, role: Role, hold: Hold) -> None:
        """What a policy holds for this request. An earlier hold of the role, of a leg that failed, is given back."""
        earlier = self.prefill_hold if role is Role.PREFILL else self.decode_hold
        if earlier is not None:
            earlier.release()
        if role is Role.PREFILL:
            self.prefill_hold = hold
        else:
            self.decode_hold = hold

    def note_prefill_usage(self, num_prompt_tokens: int | None, num_cached_tokens: int) -> None:
        """What a prefill's answer counted. Of a continuation's, where it comes before the decoder is asked, it says how
        much was generated before. Raises NotExact if nothing is left to generate."""
        if self.continuation is None:
            self.prompt_tokens = num_prompt_tokens
            self.cached_tokens = num_cached_tokens
            if self.relayed is not None:  # the legs run at once, and the decoder was quicker
                self.relayed.cached_tokens = num_cached_tokens
        elif num_prompt_tokens is not None and self.prompt_tokens is not None:
            self.continuation.recount(num_prompt_tokens - self.prompt_tokens)
            self.call = self.continuation.call

    def stop_keep_alive(self) -> None:
        if self.keep_alive is not None:
            self.keep_alive.stop()
            self.keep_alive = None

    def release_loads(self) -> None:
        if self.prefill_load is not None:
            self.prefill_load.release()
        if self.decode_load is not None:
            self.decode_load.release()
        if self.prefill_hold is not None:
            self.prefill_hold.release()
        if self.decode_hold is not None:
            self.decode_hold.release()

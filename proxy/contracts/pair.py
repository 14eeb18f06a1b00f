"""What contracts share whose legs meet under a name that the proxy mints: both are told it, and only both together can
be tried again. Pure: the addresses, the prefiller's rank and the random number come in."""

from __future__ import annotations

from typing import Any, NamedTuple

from proxy.contracts.order import Order
from proxy.contracts.unanswered import UnansweredContract
from proxy.long_body import Body
from proxy.openai_api import ApiCall


class Endpoint(NamedTuple):
    """Where an instance's KV side listens: its host and the port of its bootstrap server or KV socket."""

    host: str
    port: int

    @property
    def url_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        return f"{self.url_host}:{self.port}"


class EngineRank(NamedTuple):
    """One data-parallel rank of a prefiller, as its bootstrap server names it."""

    rank: int
    engine_id: str


class Meeting(NamedTuple):
    """What the two legs of one attempt are told."""

    prefill_body: Body
    decode_body: Body
    prefill_lines: bytes = b""
    """Header lines for the prefiller only."""
    request_id: str = ""
    """The X-Request-Id of both legs, where the contract needs one of its own."""
    kv: dict[str, Any] | None = None
    """Where the KV is once the prefill has ended; None where it is not handed out before a decoder has it."""


class PairContract(UnansweredContract):
    """`overlaps`: both legs are sent at once; else the decoder waits in the proxy for the prefill to end.
    `prefill_waits`: the prefiller answers when the decoder has the KV, so that one which hangs keeps both waiting.
    `ranked`: `meet` needs an engine rank of the prefiller, asked of its bootstrap server.
    `decodes_alone`: whether a decoder serves a request that has no prefiller."""

    order = Order.TOGETHER
    overlaps = True
    prefill_waits = False
    ranked = False
    decodes_alone = True

    def splits(self, call: ApiCall) -> bool:
        raise NotImplementedError

    def takes_whole(self, call: ApiCall) -> bool:
        return True

    def meet(
        self, call: ApiCall, prefiller: Endpoint, decoder: Endpoint, rank: EngineRank | None, number: int
    ) -> Meeting:
        """`number` has 128 random bits: whoever knows the meeting's name could take the KV."""
        raise NotImplementedError

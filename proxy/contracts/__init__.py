"""KV hand-off contracts, one pure file each: how the two bodies are made and what is done with an orphan.

To add one: a file beside `pull.py` with a class that satisfies `Contract`, and a line in `CONTRACTS`.
"""

from __future__ import annotations

from typing import Any, Protocol

from proxy.contracts.layerwise import LayerwiseContract
from proxy.contracts.mooncake import MooncakeContract
from proxy.contracts.order import Order
from proxy.contracts.p2p_nccl import P2pNcclContract
from proxy.contracts.pull import PullContract
from proxy.contracts.sglang import SglangContract
from proxy.long_body import Body
from proxy.openai_api import ApiCall

__all__ = ["AUTO", "CONTRACTS", "Contract", "Order"]


class Contract(Protocol):
    name: str
    order: Order
    decodes_alone: bool
    """Whether a decoder serves a request that has no prefiller."""

    def takes_whole(self, call: ApiCall) -> bool:
        """Whether the call can be handed over as it is; if not, it is divided (`proxy/children.py`) into calls with one
        prompt and one choice each, or computed by a decoder alone if it is indivisible."""
        ...

    def splits(self, call: ApiCall) -> bool:
        """Whether a call that is taken whole can be prefilled elsewhere; if not, a decoder computes it alone."""
        ...

    def prefill_body(self, call: ApiCall) -> Body: ...

    def kv_of(self, prefill_answer: bytes) -> dict[str, Any] | None:
        """The KV the prefiller handed out, opaque, or None. Raises ValueError if the answer is not understood."""
        ...

    def decode_body(self, call: ApiCall, kv: dict[str, Any] | None) -> Body: ...

    def may_reclaim(self, kv: dict[str, Any], dispatched: bool) -> bool:
        """Whether sending `reclaim_body` is safe, given that a decoder was or was not sent this KV already."""
        ...

    def reclaim_body(self, call: ApiCall, kv: dict[str, Any]) -> Body: ...


CONTRACTS: dict[str, type[Contract]] = {
    "pull": PullContract,
    "layerwise": LayerwiseContract,
    "mooncake": MooncakeContract,
    "sglang": SglangContract,
    "p2p-nccl": P2pNcclContract,
}
AUTO = "auto"  # which one is asked of the instances (`proxy/auto_contract.py`)

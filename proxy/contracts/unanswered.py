"""What contracts share whose prefiller's answer doesn't say where the KV is: the legs meet in another way, so there is
no body to be made out of that answer and, unless a contract has one, no way to give KV back by it."""

from __future__ import annotations

from typing import Any

from proxy.long_body import Body
from proxy.openai_api import ApiCall


class UnansweredContract:
    name: str

    def prefill_body(self, call: ApiCall) -> Body:
        raise NotImplementedError(f"{self.name}: no prefill is sent before its decode is known")

    def decode_body(self, call: ApiCall, kv: dict[str, Any] | None) -> Body:
        """For a decoder alone."""
        return call.body

    def kv_of(self, prefill_answer: bytes) -> dict[str, Any] | None:
        return None

    def may_reclaim(self, kv: dict[str, Any], dispatched: bool) -> bool:
        return False

    def reclaim_body(self, call: ApiCall, kv: dict[str, Any]) -> Body:
        raise NotImplementedError(f"{self.name}: KV that nobody takes is freed by closing connections")

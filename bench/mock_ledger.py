"""What a mock engine holds its caller to: the pull contract (kv-contracts section 2), and a ledger of KV handed out.

Pure. One `KvLedger` serves all mock instances of a process, so that a decoder knows what any prefiller handed out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

BLOCK_TOKENS = 16
MAX_VIOLATIONS = 100


class KvRefused(Exception):
    """The KV named can't be had any more: a decoder answers 503 kv_load_error."""


@dataclass(slots=True)
class HandedOut:
    """KV of one prefill: `state` goes from "offered" to exactly one of "consumed", "released", "void"."""

    params: dict[str, Any]
    request_id: str
    fingerprint: str
    producer: str
    state: str = "offered"


@dataclass(slots=True)
class KvLedger:
    flavour: str = "baton"
    """"baton": a lease, a second claim is refused. "nixl": no lease, a second claim is a violation (wrong text)."""
    strict: bool = True
    handed_out: dict[str, HandedOut] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def violation(self, text: str) -> None:
        self.counts["violations"] += 1
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(text)

    def check(self, held: bool, text: str) -> None:
        if self.strict and not held:
            self.violation(text)

    def check_prefill(self, fields: dict[str, Any], request_id: str, can_force: bool = True) -> None:
        """The prefill leg: one token, forced where the API can, not streamed, one choice, and a request for remote
        decode."""
        asked = fields.get("kv_transfer_params") or {}
        self.check(asked.get("do_remote_decode") is True, "prefill: do_remote_decode is not true")
        self.check(asked.get("do_remote_prefill") is False, "prefill: do_remote_prefill is not false")
        self.check(not any(asked.get(key) for key in asked if key.startswith("remote_")), "prefill: remote_* not null")
        self.check(fields.get("max_tokens") == 1, f"prefill: max_tokens is {fields.get('max_tokens')}")
        self.check(fields.get("max_completion_tokens", 1) == 1, "prefill: max_completion_tokens is not 1")
        least = fields.get("min_tokens")
        self.check(least == 1 if can_force else least is None, f"prefill: min_tokens is {least}")
        self.check(fields.get("stream") is False, f"prefill: stream is {fields.get('stream')}")
        self.check("stream_options" not in fields, "prefill: stream_options present")
        self.check((fields.get("n") or 1) == 1, f"prefill: n is {fields.get('n')}")
        self.check(bool(request_id), "prefill: no X-Request-Id")
        prompt = fields.get("prompt")
        several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
        self.check(not several, "prefill: several prompts, of which one's KV would be handed out")

    def hand_out(
        self, producer: str, epoch: str, request_id: str, fingerprint: str, num_tokens: int, num_cached_tokens: int = 0
    ) -> dict[str, Any]:
        """The `kv_transfer_params` of a prefiller's answer."""
        number = next(self._ids)
        host, _, port = producer.rpartition(":")
        num_blocks = -(-(num_tokens - 1) // BLOCK_TOKENS)
        params: dict[str, Any] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(number, number + min(num_blocks, 64)))],
            "remote_engine_id": f"mock-{port}-{epoch}",
            "remote_request_id": f"{request_id}-{number}",
            "remote_host": host,
            "remote_port": int(port),
            "tp_size": 1,
            "remote_num_tokens": num_tokens,
            "opaque ☃": {"nested": [1, 2.5, None, True, 'é\n"\\'], "big": 2**53 + 1},
        }
        if self.flavour == "baton":
            params["remote_prefill_cached_tokens"] = num_cached_tokens
            params["baton"] = {
                "version": 1, "transfer_id": f"t{number}", "token": f"k{number:x}", "epoch": epoch,
                "num_blocks": num_blocks
            }  # fmt: skip
        self.handed_out[params["remote_request_id"]] = HandedOut(params, request_id, fingerprint, producer)
        self.counts["handed_out"] += 1
        return params

    def claim(self, params: dict[str, Any], request_id: str, fingerprint: str) -> str | None:
        """A decoder takes KV. Returns whose text it is (None: it computes the prompt itself). Raises KvRefused."""
        if not params.get("do_remote_prefill"):
            self.check(not params, f"decode: kv_transfer_params without do_remote_prefill: {sorted(params)}")
            return None
        entry = self._entry(params, "decode")
        self.check(entry.request_id == request_id, f"decode: X-Request-Id {request_id}, prefill had {entry.request_id}")
        self.check(entry.fingerprint == fingerprint, f"decode: {request_id}: KV of another prompt")
        if entry.state != "offered":
            if self.flavour == "nixl":
                self.violation(f"decode: {request_id}: KV that is {entry.state} was used again (wrong text)")
            self.counts["claims_refused"] += 1
            raise KvRefused(f"the KV of {request_id} is {entry.state}")
        self._end(entry, "consumed")
        return entry.fingerprint

    def release(self, params: dict[str, Any]) -> None:
        """A release-only request. Releasing twice, or what was consumed, does no harm but is counted."""
        entry = self._entry({key: value for key, value in params.items() if key != "release_only"}, "release")
        if entry.state == "offered":
            self._end(entry, "released")
        else:
            self.counts["late_releases"] += 1

    def void(self, producer: str) -> None:
        """The prefiller died: what it had handed out is gone with it."""
        for entry in self.handed_out.values():
            if entry.producer == producer and entry.state == "offered":
                self._end(entry, "void")

    def void_one(self, params: dict[str, Any]) -> None:
        """The answer that would have handed this KV out never left: the engine takes it back."""
        self._end(self.handed_out[params["remote_request_id"]], "void")

    def _entry(self, params: dict[str, Any], leg: str) -> HandedOut:
        entry = self.handed_out.get(str(params.get("remote_request_id")))
        if entry is None:
            self.violation(f"{leg}: kv_transfer_params that nobody handed out: {params}")
            raise KvRefused("unknown KV")
        self.check(entry.params == params, f"{leg}: kv_transfer_params are not verbatim: {params}")
        return entry

    def _end(self, entry: HandedOut, state: str) -> None:
        entry.state = state
        self.counts[state] += 1

    def outstanding(self) -> list[str]:
        return [key for key, entry in self.handed_out.items() if entry.state == "offered"]

    def state(self) -> dict[str, Any]:
        return {"outstanding": self.outstanding(), "counts": dict(self.counts), "violations": self.violations}

    def forget_ended(self) -> None:
        """Keep a long benchmark's memory flat."""
        self.handed_out = {key: entry for key, entry in self.handed_out.items() if entry.state == "offered"}

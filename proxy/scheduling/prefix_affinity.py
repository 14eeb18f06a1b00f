"""Policy `prefix_affinity`: send a prefix where it was prefilled last, unless load says no."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import orjson

from proxy.openai_api import ApiCall
from proxy.scheduling.candidate import CandidateT
from proxy.scheduling.least_load import LeastLoad
from proxy.scheduling.policy import Ask, Policy, Prefix

CHUNK_BYTES = 1024  # about 16 blocks of 16 tokens: short of it there is little to save
MAX_BYTES = 256 * CHUNK_BYTES  # of a prompt; what comes after them follows the beginning anyway
MAX_REMEMBERED = 1 << 17  # chunks over all prompts; the least recently used is forgotten, some 20 MB at most


class Prefixes(Protocol):
    """Where each beginning of a prompt was sent last."""

    def get(self, key: int, /) -> str | None: ...

    def remember(self, role: str, keys: Sequence[int], name: str) -> None: ...


class Remembered(OrderedDict[int, str]):
    """By this process, up to `limit`."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def remember(self, role: str, keys: Sequence[int], name: str) -> None:
        for key in reversed(keys):  # the beginning is the youngest: a chain is forgotten from its end
            self[key] = name
            self.move_to_end(key)
        while len(self) > self._limit:
            self.popitem(last=False)


class PrefixAffinity(Policy):
    """score [s] = expected wait of `least_load` with (num_tokens - saved) of its own [tokens]; lower is better

    saved = length of the longest beginning of the prompt [tokens] that was last sent to the instance; 0 for all the
    others. So the instance that has the prefix wins as long as it is not behind the best other one by more than
    the time the prefix would take to prefill anew. With nothing remembered it is `least_load`.
    """

    name = "prefix_affinity"

    def __init__(self, role: str, seed: int | None = None, max_remembered: int = MAX_REMEMBERED) -> None:
        super().__init__(role, seed)
        self._least_load = LeastLoad(role, seed)
        self._sent_to: Prefixes = Remembered(max_remembered)

    def share(self, prefixes: Prefixes) -> None:
        """Remember there, where other worker processes do."""
        self._sent_to = prefixes

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        prefix = ask.prefix
        picked = self._least_load.pick(candidates, num_tokens, ask)
        self.decided_by = self._least_load.name
        owner, num_chunks = self._owner(candidates, prefix.keys)
        if owner is not None and owner is not picked:
            rest = max(num_tokens - int(num_chunks * prefix.chunk_tokens), 1)
            if self._least_load.score(owner.load, rest) <= self._least_load.score(picked.load, num_tokens):
                picked = owner
        if owner is picked:
            self.decided_by = "prefix"
        self._sent_to.remember(self.role, prefix.keys, picked.key)
        return picked

    def waits(self, candidates: Sequence[CandidateT], num_tokens: int) -> list[float]:
        return self._least_load.waits(candidates, num_tokens)

    def _owner(self, candidates: Sequence[CandidateT], keys: Sequence[int]) -> tuple[CandidateT | None, int]:
        """Who has the longest beginning, of those offered, and how many chunks of it."""
        sent_to = self._sent_to
        owners: dict[str, int] = {}
        for num_chunks, key in enumerate(keys, 1):
            name = sent_to.get(key)
            if name is None:
                break
            owners[name] = num_chunks
        if not owners:
            return None, 0
        offered = [one for one in candidates if one.key in owners]
        owner = max(offered, key=lambda one: owners[one.key], default=None)
        return owner, owners[owner.key] if owner is not None else 0


def prefix_of(call: ApiCall) -> Prefix:
    """The chain of hashes over a prompt's chunks: text, messages or token ids as JSON, behind what changes its KV.

    Python's own hash, salted in each process, is enough: the keys never leave the process, and two prompts that share
    one by accident cost a detour.
    """
    fields = call.fields
    text = _beginning(call)
    key = hash(orjson.dumps([fields.get("model"), fields.get("cache_salt"), fields.get("tools")]))
    keys = []
    for start in range(0, len(text) - CHUNK_BYTES + 1, CHUNK_BYTES):
        key = hash((key, text[start : start + CHUNK_BYTES]))
        keys.append(key)
    return Prefix(tuple(keys), call.num_prompt_tokens * CHUNK_BYTES / len(call.body))


def _beginning(call: ApiCall) -> bytes:
    """At most MAX_BYTES of the prompt. What comes behind them (images in messages, say) is not even serialised."""
    fields = call.fields
    if call.route not in ("chat", "messages"):
        prompt = fields.get("input" if call.route == "responses" else "prompt")
        if isinstance(prompt, str):
            return prompt[:MAX_BYTES].encode()[:MAX_BYTES]
        return orjson.dumps(prompt[:MAX_BYTES] if isinstance(prompt, list) else prompt)[:MAX_BYTES]
    text = orjson.dumps(fields["system"]) if "system" in fields else b""  # Anthropic's stands beside the messages
    for message in fields["messages"]:
        text += orjson.dumps(message)
        if len(text) >= MAX_BYTES:
            break
    return text[:MAX_BYTES]

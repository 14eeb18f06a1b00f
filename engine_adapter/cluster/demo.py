"""One streamed chat completion through the proxy, shown as it comes, and what it cost: tokens, bytes moved, times."""

from __future__ import annotations

import json
import re
import shlex
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.plan import Plan, PlannedProcess
from engine_adapter.cluster.screen import Screen
from engine_adapter.cluster.warmup import base_url

PROMPT = (
    "Tell a short story about two runners, one fast over the first hundred metres and one with long breath, who share "
    "one race: how the first carries the baton, where they meet, what is handed over, and why neither waits."
)
NUM_TOKENS = 48
TIMEOUT_S = 300.0

_PULLED = re.compile(r"^baton_sidecar_pull_(blocks|bytes)_total\{(?P<labels>[^}]*)\} (?P<value>\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Moved = dict[tuple[str, str, str], dict[str, int]]
"""(from, to, transport) -> {"blocks": n, "bytes": n}; from and to are `engine_id@host:port` of the sidecars."""


@dataclass(slots=True)
class Answer:
    """What one stream showed of itself."""

    num_prompt_tokens: int = 0
    num_tokens: int = 0
    ttft_s: float = 0.0
    """To the first token of the answer."""
    last_s: float = 0.0

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.ttft_s) / max(1, self.num_tokens - 1)


async def show(plan: Plan, screen: Screen, *, prompt: str = PROMPT, random_weights: bool) -> None:
    """Raises ClusterError if the answer fails, or came without KV having moved."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as http:
        before = await _moved(http, plan)
        body = {
            "model": plan.served_name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        screen.line(f"\nuser: {prompt}")
        screen.piece("assistant: ")
        try:
            answer = await _stream(http, base_url(plan.proxy) + "/v1/chat/completions", body, screen)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClusterError(f"the demonstration's stream broke: {type(error).__name__}: {error}") from error
        after = await _moved(http, plan)
    if random_weights:
        screen.line("(the model's weights are random, so the words mean nothing; `make demo MODEL=DIR` serves yours)")
    moved = _difference(before, after)
    screen.line("\n" + table(answer, moved))
    screen.line("\ntry it:\n  " + curl_line(plan))
    if not moved:
        raise ClusterError("the answer came, but no sidecar moved KV for it; see the logs of the decoders")


def table(answer: Answer, moved: Moved) -> str:
    rows = [("prompt tokens", str(answer.num_prompt_tokens)), ("generated tokens", str(answer.num_tokens))]
    for (source, target, transport), num in moved.items():
        rows += [
            ("KV moved", f"{num['bytes']:,} bytes in {num['blocks']} blocks"),
            ("  from", source),
            ("  to", target),
            ("  over", transport),
        ]
    rows += [("TTFT", f"{answer.ttft_s * 1000:.1f} ms"), ("TPOT", f"{answer.tpot_s * 1000:.1f} ms")]
    return "\n".join(f"{name:<17} {value}" for name, value in rows)


def curl_line(plan: Plan) -> str:
    body = {"model": plan.served_name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
    url = base_url(plan.proxy) + "/v1/chat/completions"
    return f"curl -N {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps({**body, 'stream': True}))}"


async def _stream(http: aiohttp.ClientSession, url: str, body: dict[str, Any], screen: Screen) -> Answer:
    answer, begun = Answer(), time.perf_counter()
    async with http.post(url, json=body) as response:
        if response.status != 200:
            raise ClusterError(f"the proxy answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                _take(json.loads(line[6:]), time.perf_counter() - begun, answer, screen)
    screen.line()
    return answer


def _take(event: dict[str, Any], now_s: float, answer: Answer, screen: Screen) -> None:
    if "error" in event:
        raise ClusterError(f"the stream ended in an error: {event['error']}")
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        if delta.get("content") or choice.get("finish_reason"):
            answer.ttft_s = answer.ttft_s or now_s
            answer.last_s = now_s
            screen.piece(delta.get("content") or "")
    if event.get("usage"):
        answer.num_prompt_tokens = event["usage"]["prompt_tokens"]
        answer.num_tokens = event["usage"]["completion_tokens"]


async def _moved(http: aiohttp.ClientSession, plan: Plan) -> Moved:
    moved: Moved = {}
    for sidecar in plan.of_kind("sidecar"):
        async with http.get(sidecar.metrics_url) as answer:
            moved |= parse_moved(await answer.text(), _identity(sidecar))
    return moved


def _identity(sidecar: PlannedProcess) -> str:
    return f"{sidecar.argv[sidecar.argv.index('--engine-id') + 1]}@{sidecar.address}"


def parse_moved(exposition: str, target: str) -> Moved:
    """What a sidecar's /metrics (Prometheus text) says it pulled."""
    moved: Moved = {}
    for match in _PULLED.finditer(exposition):
        labels = dict(_LABEL.findall(match["labels"]))
        key = (labels.get("peer", "?"), target, labels.get("transport", "?"))
        moved.setdefault(key, {"blocks": 0, "bytes": 0})[match[1]] = int(float(match["value"]))
    return moved


def _difference(before: Moved, after: Moved) -> Moved:
    none = {"blocks": 0, "bytes": 0}
    grown = {
        key: {unit: num - before.get(key, none)[unit] for unit, num in nums.items()} for key, nums in after.items()
    }
    return {key: nums for key, nums in grown.items() if nums["bytes"]}

"""A split deployment, what is asked of it, and what must hold of every one, however its KV moves."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm.servers import Ask, Server, baton, eventually, post, vllm_server

WORDS = (
    "river", "stone", "light", "seven", "garden", "iron", "paper", "quick", "cloud", "winter", "music", "table",
    "glass", "bread", "ocean", "wheel",
)  # fmt: skip
LENGTHS = (1, 5, 20, 60, 150, 400)
ASK_FOR_REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Split:
    """One prefiller, one decoder, the proxy before them, and an unsplit vLLM to compare with."""

    prefiller: Server
    decoder: Server
    proxy: Server
    unsplit: Server


def prompt(num_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def used(server: Server) -> float:
    return server.metric("vllm:kv_cache_usage_perc")


def nothing_held(split: Split) -> bool:
    return used(split.prefiller) == 0 and used(split.decoder) == 0


def by_source(server: Server, source: str) -> float:
    return server.metric("vllm:prompt_tokens_by_source_total", source=source)


def prefill(split: Split, text: str) -> dict[str, Any]:
    """What the prefiller hands out for `text`."""
    body = {"model": "m", "prompt": text, "temperature": 0, "max_tokens": 1, "min_tokens": 1}
    given: dict[str, Any] = {}

    def handed_out() -> bool:  # not while a sidecar is being replaced
        status, raw = post(split.prefiller, "/v1/completions", {**body, "kv_transfer_params": ASK_FOR_REMOTE_DECODE})
        assert status == 200, raw
        given.update(json.loads(raw)["kv_transfer_params"] or {})
        return bool(given)

    assert eventually(handed_out)
    assert given["do_remote_prefill"] is True
    return given


def same_answers(split: Server, unsplit: Server, seed: int) -> None:
    """Greedy text, chat and completion, streamed and not."""
    for number, length in enumerate(LENGTHS):
        text, chat, stream = prompt(length, seed + number), number % 2 == 1, number % 3 == 0
        assert Ask(text, chat, stream).text(split) == Ask(text, chat).text(unsplit)


def same_answers_in_every_form(split: Split, chat: bool, stream: bool, seed: int) -> None:
    """And every prompt token but the last comes from the prefiller."""
    before = {source: by_source(split.decoder, source) for source in ("external_kv_transfer", "local_compute")}
    for number, length in enumerate(LENGTHS):
        text = prompt(length, seed + number)
        want = Ask(text, chat).text(split.unsplit)
        assert len(set(want)) > 5  # a model that repeats one token could not show a bad load
        assert Ask(text, chat, stream).text(split.proxy) == want
    assert by_source(split.decoder, "external_kv_transfer") > before["external_kv_transfer"]
    assert by_source(split.decoder, "local_compute") - before["local_compute"] <= len(LENGTHS)
    assert eventually(lambda: nothing_held(split))


def sidecar_is_replaced(split: Split, whose: str, number: signal.Signals, seed: int) -> None:
    """The sidecar of one half dies or hangs: never a wrong answer, and right ones again in bounded time."""
    server: Server = getattr(split, whose)
    pid = server.sidecar_pid()
    os.kill(pid, number)
    ask = Ask(prompt(120, seed + number + len(whose)))
    want = ask.text(split.unsplit)

    def right() -> bool:
        status, raw = post(split.proxy, ask.path, ask.body())
        assert status != 200 or json.loads(raw)["choices"][0]["text"] == want
        return status == 200 and not os.path.exists(f"/proc/{pid}")

    assert eventually(right, 120)
    assert eventually(lambda: nothing_held(split), 60)


def prefiller_with_tier(name: str, model: Path, directory: Path, **extra: Any) -> Server:
    """Our connector and vLLM's ExampleConnector, which keeps what was prefilled in a directory, in a MultiConnector."""
    tier = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(directory / "tier")},
    }
    several = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"connectors": [baton("kv_producer", **extra), tier]},
    }
    return vllm_server(name, model, directory, several, "--no-enable-prefix-caching")


def tier_is_used(split: Split, seed: int) -> None:
    """The second time a prompt comes out of the prefiller's tier."""
    same_answers(split.proxy, split.unsplit, seed)
    before = by_source(split.prefiller, "external_kv_transfer")
    post(split.decoder, "/reset_prefix_cache", {})
    same_answers(split.proxy, split.unsplit, seed)
    assert by_source(split.prefiller, "external_kv_transfer") > before
    assert eventually(lambda: nothing_held(split))

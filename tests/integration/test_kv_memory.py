"""However the sidecar gets at the KV, the split cluster's text is the unsplit engine's, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.deployment import BIN, Command, Deployment, Instance, free_port, metric
from tests.integration.greedy import Answer, Prompt, ask_all, prompts

NUM_PROMPTS = 16
SMALL_BUFFER = ["--kv-staging-bytes", "13MiB"]
"""Room for one prompt of the longest kind and a little more: with four at once there is always somebody waiting."""


@dataclass
class OwnSidecars(Deployment):
    """Every engine starts its sidecar itself; `memory` is the prefiller's and the decoder's --kv-memory."""

    memory: dict[str, str] = field(default_factory=dict)

    @property
    def commands(self) -> list[Command]:
        return [*(instance.engine for instance in self.instances), *([self.proxy] if hasattr(self, "proxy") else [])]

    def _instance(self, role: str, index: int) -> Instance:
        port, metrics_port, name = free_port(), free_port(), f"{role}{index}"
        url = f"http://127.0.0.1:{port}"
        engine = Command(
            name,
            [str(BIN / "pd-engine"), "serve", "--model", str(self.model), "--served-model-name", "tiny", "--role", role,
             "--port", str(port), "--sidecar", "auto", "--sidecar-metrics-port", str(metrics_port), "--engine-id", name,
             "--kv-memory", self.memory[role], "--dtype", "float32", "--num-threads", "1", *self.engine_args],
            f"{url}/health",
            self._directory / f"{name}.log",
        )  # fmt: skip
        return Instance(role, url, f"http://127.0.0.1:{metrics_port}", engine, engine)


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return prompts(NUM_PROMPTS, seed=11)


@pytest.fixture(scope="module")
def expected(tiny_model: Path, asked: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Answer]]:
    """Of one engine that does both halves itself."""
    port = free_port()
    argv = [str(BIN / "pd-engine"), "serve", "--model", str(tiny_model), "--served-model-name", "tiny"]
    argv += ["--port", str(port), "--dtype", "float32", "--num-threads", "1"]
    url = f"http://127.0.0.1:{port}"
    command = Command("unsplit", argv, f"{url}/health", tmp_path_factory.mktemp("unsplit") / "log")
    command.start()
    try:
        command.wait_ready()
        yield asyncio.run(ask_all(url, asked, stream=[False] * len(asked)))
    finally:
        command.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [("staging", "staging", "shm"), ("in_process", "in_process", "tcp"), ("staging", "in_process", "shm"),
     ("in_process", "shm", "tcp")],
)  # fmt: skip
async def test_split_equals_unsplit(
    tiny_model: Path, asked: list[Prompt], expected: list[Answer], prefill: str, decode: str, transport: str
) -> None:
    memory = {"prefill": prefill, "decode": decode}
    args = ["--no-enable-prefix-caching", *(SMALL_BUFFER if "staging" in (prefill, decode) else [])]
    with OwnSidecars(tiny_model, engine_args=args, memory=memory) as split:
        answers = await ask_all(split.url, asked, stream=[False] * len(asked), num_at_once=4)
        assert answers == expected
        decoder = split.decoders[0]
        crossed = metric(decoder.url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
        assert crossed == sum(answer.num_prompt_tokens - 1 for answer in expected)
        assert metric(decoder.sidecar_url, "baton_sidecar_pull_bytes_total", transport=transport) > 0
        assert split.settles(within_s=5) == {}
        for instance in split.instances:
            log = instance.engine.log.read_text()
            assert f"kv_memory provider={memory[instance.role]} " in log


@pytest.mark.timeout(300)
async def test_layers_pushed_through_staging_buffers(
    tiny_model: Path, asked: list[Prompt], expected: list[Answer]
) -> None:
    """Prompts of many chunks and of a part of a block: what is marked is copied first, layer by layer."""
    few = slice(8, 14)
    with OwnSidecars(
        tiny_model, engine_args=["--no-enable-prefix-caching", *SMALL_BUFFER], proxy_args=["--contract", "layerwise"],
        memory={"prefill": "staging", "decode": "staging"},
    ) as split:  # fmt: skip
        answers = await ask_all(split.url, asked[few], stream=[False] * len(asked[few]), num_at_once=3)
        assert answers == expected[few]
        crossed = metric(split.decoders[0].url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
        assert crossed == sum(answer.num_prompt_tokens - 1 for answer in expected[few])
        assert split.settles(within_s=5) == {}

"""The split cluster's greedy text is the unsplit engine's, token for token, and its KV really crossed."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration.deployment import BIN, Command, Deployment, free_port, metric
from tests.integration.greedy import Answer, Prompt, ask, ask_all, prompts

BLOCK_SIZE = 16
NO_PREFIX_CACHE = ["--no-enable-prefix-caching"]
SOURCE = "vllm:prompt_tokens_by_source_total"


@pytest.fixture(scope="module")
def unsplit(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one engine that does both halves itself."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [
        str(BIN / "pd-engine"),
        "serve",
        "--model",
        str(tiny_model),
        "--served-model-name",
        "tiny",
        "--role",
        "both",
    ]
    argv += ["--port", str(port), "--dtype", "float32", "--num-threads", "1"]
    command = Command("unsplit", argv, f"{url}/health", tmp_path_factory.mktemp("unsplit") / "log")
    command.start()
    try:
        command.wait_ready()
        yield url
    finally:
        command.stop()


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return prompts(64, seed=7)


@pytest.fixture(scope="module")
def expected(unsplit: str, asked: list[Prompt]) -> list[Answer]:
    return asyncio.run(ask_all(unsplit, asked, stream=[False] * len(asked)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 1), (2, 2)], ids=["1p1d", "2p2d"])
@pytest.mark.parametrize(
    ("transport", "contract"),
    [
        ("shm", "pull"),
        pytest.param("mooncake", "pull", marks=pytest.mark.mooncake),
        ("shm", "layerwise"),
        ("tcp", "layerwise"),
    ],
)
async def test_64_prompts_split_equal_unsplit(
    tiny_model: Path,
    asked: list[Prompt],
    expected: list[Answer],
    transport: str,
    contract: str,
    num_prefill: int,
    num_decode: int,
) -> None:
    stream = [(index // 2) % 2 == (num_prefill + (transport == "shm")) % 2 for index in range(len(asked))]
    proxy_args = ["--contract", contract]
    with Deployment(
        tiny_model, num_prefill, num_decode, transport, engine_args=NO_PREFIX_CACHE, proxy_args=proxy_args
    ) as split:
        answers = await ask_all(split.url, asked, stream=stream)
        assert answers == expected
        _assert_kv_crossed(split, [answer.num_prompt_tokens for answer in expected], transport)
        assert split.settles(within_s=5) == {}


def _assert_kv_crossed(split: Deployment, num_prompt_tokens: list[int], transport: str) -> None:
    """Every decoder computed one prompt token a request; the others came over `transport`, block by block."""

    def over_decoders(name: str, **labels: str) -> float:
        return sum(metric(decoder.url, name, **labels) for decoder in split.decoders)

    assert over_decoders(SOURCE, source="external_kv_transfer") == sum(n - 1 for n in num_prompt_tokens)
    assert over_decoders(SOURCE, source="local_compute") == len(num_prompt_tokens)
    num_blocks = sum(math.ceil((n - 1) / BLOCK_SIZE) for n in num_prompt_tokens)
    moved = {
        name: sum(
            metric(d.sidecar_url, f"baton_sidecar_pull_{name}_total", transport=transport) for d in split.decoders
        )
        for name in ("blocks", "bytes")
    }
    assert moved == {"blocks": num_blocks, "bytes": num_blocks * BLOCK_BYTES}
    for instance in split.instances:
        share = metric(instance.url, "vllm:prompt_tokens_total")
        assert share > 0, f"{instance.engine.name} was never picked"


BLOCK_BYTES = 4 * 2 * BLOCK_SIZE * 2 * 32 * 4
"""Layers x (K and V) x tokens x KV heads x head size x bytes of a float32, of the tiny Qwen3."""


async def test_repeated_prompts_hit_prefix_caches_and_stay_equal(
    tiny_model: Path, asked: list[Prompt], expected: list[Answer]
) -> None:
    long_ones = [index for index, answer in enumerate(expected) if answer.num_prompt_tokens > 100][:12]
    twice = [asked[index] for index in long_ones] * 2
    with Deployment(tiny_model) as split:
        answers = await ask_all(split.url, twice, stream=[False] * len(twice), num_at_once=4)
        assert answers == [expected[index] for index in long_ones] * 2
        assert metric(split.prefillers[0].url, SOURCE, source="local_cache_hit") > 0
        assert metric(split.decoders[0].url, SOURCE, source="local_cache_hit") > 0


@pytest.mark.parametrize("decode_block_size", [8, 32])
async def test_halves_of_other_block_sizes_answer_what_the_unsplit_engine_does(
    tiny_model: Path, asked: list[Prompt], expected: list[Answer], decode_block_size: int
) -> None:
    """With a prefix cache that has part of the second prompts, in blocks of the decoder's size."""
    twice = [*asked[:24], *asked[:24]]
    decode_args = ["--block-size", str(decode_block_size)]
    with Deployment(tiny_model, engine_args=["--block-size", str(BLOCK_SIZE)], decode_args=decode_args) as split:
        answers = await ask_all(split.url, twice, stream=[False] * len(twice), num_at_once=4)
        assert answers == [*expected[:24], *expected[:24]]
        assert metric(split.decoders[0].url, SOURCE, source="external_kv_transfer") > 0
        assert metric(split.decoders[0].url, SOURCE, source="local_compute") <= len(twice)
        assert split.settles(within_s=5) == {}


async def test_one_flipped_byte_of_the_kv_changes_the_text(tiny_model: Path, unsplit: str) -> None:
    """The comparison can fail: the decoder reads what was transferred, and nothing else."""
    prompt = prompts(45, seed=3)[44]
    body = {"model": "tiny", "max_tokens": 16, "temperature": 0, **prompt.body}
    with Deployment(tiny_model, engine_args=NO_PREFIX_CACHE) as split:
        prefiller, decoder = split.prefillers[0], split.decoders[0]
        async with aiohttp.ClientSession() as session:
            right = await ask(session, unsplit, prompt, stream=False)
            for flip in (False, True):
                first_leg = body | {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
                async with session.post(prefiller.url + "/v1/completions", json=first_leg) as response:
                    params = (await response.json())["kv_transfer_params"]
                if flip:
                    assert prefiller.engine.process is not None
                    _flip_a_byte(prefiller.engine.process.pid, params["remote_block_ids"][0][0] * BLOCK_BYTES)
                answer = await ask(session, decoder.url, prompt, stream=False, kv_transfer_params=params)
                assert (answer == right) is not flip


def _flip_a_byte(pid: int, block_offset: int) -> None:
    """Turn the exponent of the first value of V, layer 0, in the block at `block_offset` of the process's KV pool."""
    offset = block_offset + BLOCK_BYTES // 4 // 2 + 3
    descriptors = [entry.path for entry in os.scandir(f"/proc/{pid}/fd") if "memfd:" in os.readlink(entry.path)]
    pools = {os.stat(path).st_ino: path for path in descriptors}
    assert len(pools) == 1, descriptors
    pool = os.open(*pools.values(), os.O_RDWR)
    try:
        before = os.pread(pool, 1, offset)
        os.pwrite(pool, bytes([before[0] ^ 0x40]), offset)
    finally:
        os.close(pool)


def test_the_commands_are_installed() -> None:
    for command in ("pd-proxy", "pd-engine", "pd-sidecar", "pd-cluster"):
        version = subprocess.run(
            [str(BIN / command), "--version"], capture_output=True, text=True, timeout=60, check=True
        )
        assert "pd-baton" in version.stdout

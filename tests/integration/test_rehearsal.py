"""`pd-cluster up FILE --rehearse`: a whole topology on this machine, with the real proxy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from bench.mock_answers import scripts_of

ROOT = Path(__file__).parents[2]
PD_CLUSTER = [str(Path(sys.executable).with_name("pd-cluster"))]
LIMIT_S = 300.0
NUM_REQUESTS, NUM_AT_ONCE = 1000, 40

TORCH = """
name = "small"
node = [{ address = "10.9.0.1", hardware = "cpu" }, { address = "10.9.0.2", hardware = "cpu" }]
model = { path = "/models/M", served_name = "m" }
engine = { kind = "vllm", engine_version = "0.23.0" }
connector = { name = "BatonConnector" }
proxy = { node = "10.9.0.1", port = 18123 }
instance = [{ role = "prefill", nodes = ["10.9.0.1"] }, { role = "decode", nodes = ["10.9.0.2"] }]
"""


class Rehearsal:
    def __init__(self, directory: Path, file: Path, *flags: str) -> None:
        self.directory, self.file = directory, file
        self.output = directory / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*PD_CLUSTER, "up", str(file), "--rehearse", *flags],
                cwd=directory,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def url(self) -> str:
        """Of the proxy, when it serves."""
        deadline = time.monotonic() + LIMIT_S
        while " on http://" not in self.output.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)
        return "http://" + self.output.read_text().partition(" on http://")[2].partition(";")[0]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*PD_CLUSTER, *words], cwd=self.directory, capture_output=True, text=True, check=False)

    def pids(self) -> list[int]:
        (share,) = json.loads(self.command("status", str(self.file), "--json").stdout)
        return [process["pid"] for process in share["processes"]]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(LIMIT_S)


@pytest.fixture
def rehearsals() -> Iterator[list[Rehearsal]]:
    started: list[Rehearsal] = []
    yield started
    for one in started:
        one.end()


async def ask(http: aiohttp.ClientSession, url: str, number: int, gate: asyncio.Semaphore) -> bool:
    """Whether the answer is the right one; every other one is streamed."""
    body: dict[str, Any] = {"model": "ds_r1", "prompt": f"Question {number}", "max_tokens": 1 + number % 7}
    async with gate:
        if number % 2 == 0:
            async with http.post(url, json=body) as answer:
                assert answer.status == 200, await answer.text()
                said = (await answer.json())["choices"][0]["text"]
        else:
            async with http.post(url, json={**body, "stream": True}) as answer:
                assert answer.status == 200, await answer.text()
                events = [line[6:] for line in (await answer.text()).splitlines() if line.startswith("data: ")]
                said = "".join(c["text"] for event in events[:-1] for c in json.loads(event)["choices"])
                assert events[-1] == "[DONE]"
    return bool(said == scripts_of(body)[0].text())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("contract", ["layerwise", "mooncake"])
async def test_deepseeks_plan_carries_a_thousand_requests(
    contract: str, tmp_path: Path, rehearsals: list[Rehearsal]
) -> None:
    """Seed 003: 4 prefill and 32 decode API servers; mooncake is contract pull."""
    file = ROOT / "configs" / "deployments" / f"deepseek-v3.1-2p1d-{contract}.toml"
    one = Rehearsal(tmp_path, file)
    rehearsals.append(one)
    url = await asyncio.to_thread(one.url)
    gate = asyncio.Semaphore(NUM_AT_ONCE)
    connector = aiohttp.TCPConnector(limit=NUM_AT_ONCE)
    async with aiohttp.ClientSession(connector=connector) as http:
        right = await asyncio.gather(
            *(ask(http, f"{url}/v1/completions", number, gate) for number in range(NUM_REQUESTS))
        )
        engines = url.rpartition(".")[0] + ".3:7100"  # a decoder; all engines are one process
        async with http.get(f"{engines}/mock/state") as answer:
            state = await answer.json()
    assert sum(right) == NUM_REQUESTS
    instances = state["instances"]
    assert sorted(it["role"] for it in instances) == ["decode"] * 32 + ["prefill"] * 4
    assert state["kv"]["violations"] == []
    assert state["kv"]["outstanding"] == []
    assert state["kv"]["counts"]["handed_out"] >= NUM_REQUESTS
    assert all(it["counts"].get("finished", 0) > 0 for it in instances)
    pids = one.pids()
    assert one.command("down", str(file)).returncode == 0
    assert one.process.wait(LIMIT_S) == 0
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.timeout(400)
def test_a_small_plan_is_rehearsed_with_torch_engine(tmp_path: Path, rehearsals: list[Rehearsal]) -> None:
    file = tmp_path / "small.toml"
    file.write_text(TORCH)
    one = Rehearsal(tmp_path, file, "--once", "--warm-up-prompts", "1")
    rehearsals.append(one)
    assert one.process.wait(LIMIT_S) == 0, one.output.read_text()
    said = one.output.read_text()
    assert "2 API servers are torch_engine, tiny qwen3" in said
    assert "serves m on http://127." in said and ".0.1:18123;" in said
    assert " failed: " not in said
    left = [path for path in (tmp_path / ".baton/run/small/rehearsal").iterdir() if path.suffix != ".log"]
    assert [path.name for path in left] == ["supervisor.pid"]

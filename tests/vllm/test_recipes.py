"""The recipes of bench/recipes against a split deployment of torch_engine, with the real tools, in small.

tests/unit/bench/test_recipes.py holds that the recipes say what the seeds say.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load
from tests.integration.deployment import Deployment, metric
from tests.vllm.servers import ENVIRONMENT, VLLM_VENV

ROOT = Path(__file__).parents[2]
RECIPES, DEPLOYMENTS = ROOT / "bench" / "recipes", ROOT / "configs" / "deployments"
AIS_BENCH = Path(os.environ.get("AIS_BENCH_VENV", "none")) / "bin" / "ais_bench"
TIMEOUT_S = 500
NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN = 6, 64, 8
SMALL = (
    "--num-prompts", str(NUM_PROMPTS), "--random-input-len", str(INPUT_LEN), "--random-output-len", str(OUTPUT_LEN),
)  # fmt: skip

pytestmark = pytest.mark.timeout(TIMEOUT_S + 200)


@pytest.fixture(scope="module")
def deployment(model: Path) -> Iterator[Deployment]:
    with Deployment(model) as started:
        yield started


def run(tools: Path, *argv: str, place: Path, **environment: str) -> None:
    """It must end well."""
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        argv, env=os.environ | ENVIRONMENT | environment | {"PATH": path, "VLLM_PLUGINS": ""}, cwd=place, text=True,
        timeout=TIMEOUT_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def vllm_results(recipe: str, *words: str, place: Path) -> dict[str, Any]:
    flags = (*SMALL, "--save-result", "--result-dir", str(place), "--result-filename", "results.json")
    run(Path(VLLM_VENV) / "bin", str(RECIPES / recipe), *words, *flags, place=place)
    results: dict[str, Any] = json.loads((place / "results.json").read_text())
    return results


def num_handed_off(deployment: Deployment) -> float:
    """Requests that the prefiller was done with."""
    (prefiller,) = deployment.prefillers
    return metric(prefiller.url, "vllm:request_success_total")


def check(results: dict[str, Any]) -> None:
    assert (results["completed"], results["failed"]) == (NUM_PROMPTS, 0)
    assert results["total_input_tokens"] >= NUM_PROMPTS * INPUT_LEN * 0.9
    assert results["total_output_tokens"] == NUM_PROMPTS * OUTPUT_LEN, "ignore_eos: exactly so many"
    assert results["mean_tpot_ms"] > 0
    assert results["mean_ttft_ms"] > 0


@pytest.mark.parametrize("recipe", ["vllm_bench_serve.sh", "benchmark_serving.sh"])
def test_vllm_bench_serve(deployment: Deployment, recipe: str, tmp_path: Path) -> None:
    before = num_handed_off(deployment)
    model = str(deployment.model)
    words = ("tiny", "--tokenizer", model) if recipe == "vllm_bench_serve.sh" else ("tiny", model)
    check(vllm_results(recipe, deployment.url, *words, place=tmp_path))
    assert num_handed_off(deployment) - before >= NUM_PROMPTS
    assert deployment.settles(30) == {}


@pytest.mark.skipif(not AIS_BENCH.exists(), reason="AIS_BENCH_VENV does not name an environment with ais_bench")
@pytest.mark.parametrize("command", ["recipe", "plan"])
def test_ais_bench(deployment: Deployment, command: str, tmp_path: Path) -> None:
    before = num_handed_off(deployment)
    if command == "recipe":
        words = (deployment.url, "tiny", str(deployment.model))
        run(AIS_BENCH.parent, str(RECIPES / "ais_bench.sh"), *words, place=tmp_path)
    else:
        argv = planned_for(deployment, tmp_path)
        run(AIS_BENCH.parent, *argv, place=tmp_path, AIS_BENCH_DATASETS_CACHE=str(RECIPES))
    num_questions = len((RECIPES / "ais_bench/datasets/gsm8k/test.jsonl").read_text().splitlines())
    (common,) = tmp_path.glob("outputs/default/*/performances/vllm-api-stream-chat/gsm8k.json")
    counts = json.loads(common.read_text())
    assert counts["Success Requests"]["total"] == num_questions
    assert counts["Failed Requests"]["total"] == 0
    with common.with_suffix(".csv").open() as table:
        averages = {row["Performance Parameters"]: row["Average"] for row in csv.DictReader(table)}
    assert float(averages["TTFT"].removesuffix(" ms")) > 0
    assert float(averages["TPOT"].removesuffix(" ms")) > 0
    assert 1 <= float(averages["OutputTokens"]) <= 10
    assert num_handed_off(deployment) - before >= num_questions
    assert deployment.settles(30) == {}


def planned_for(deployment: Deployment, place: Path) -> tuple[str, ...]:
    """The command of seed 003's plan; its model file is written, with this deployment in the place of the seed's."""
    bench = deployment_plan(load(DEPLOYMENTS / "deepseek-v3.1-2p1d-mooncake.toml")).bench
    assert bench is not None
    (file,) = bench.files
    assert file.text is not None
    host, port = deployment.url.removeprefix("http://").split(":")
    ours = {"path": str(deployment.model), "model": "tiny", "host_ip": host, "host_port": int(port)}
    text = file.text
    for key, value in ours.items():
        text, num_replaced = re.subn(rf"(?m)\b{key}=.*,$", f"{key}={value!r},", text)
        assert num_replaced == 1
    (place / file.path).parent.mkdir(parents=True)
    (place / file.path).write_text(text)
    return bench.argv

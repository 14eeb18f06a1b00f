"""The recipes of bench/recipes against a split deployment of torch_engine, with the real tools, in small.

tests/unit/bench/test_recipes.py holds that the recipes say what the seeds say.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.deployment import Deployment, metric
from tests.vllm.servers import ENVIRONMENT, VLLM_VENV

RECIPES = Path(__file__).parents[2] / "bench" / "recipes"
AIS_BENCH = Path(os.environ.get("AIS_BENCH_VENV", "none")) / "bin" / "ais_bench"
TIMEOUT_S = 500
NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN = 6, 64, 8
SMALL = (
    "--num-prompts", str(NUM_PROMPTS), "--random-input-len", str(INPUT_LEN), "--random-output-len", str(OUTPUT_LEN),
)  # fmt: skip

pytestmark = pytest.mark.timeout(TIMEOUT_S + 200)


@pytest.fixture(scope="module")
def deployment(model: Path) -> Iterator[Deployment]:
    with Deployment(model, num_prefill=1, num_decode=2) as started:
        yield started


def run(tools: Path, recipe: str, *words: str, place: Path) -> str:
    """A recipe's output; it must end well."""
    env = os.environ | ENVIRONMENT | {"PATH": f"{tools}:{os.environ['PATH']}", "VLLM_PLUGINS": ""}
    done = subprocess.run(
        ["bash", str(RECIPES / recipe), *words], env=env, cwd=place, text=True, timeout=TIMEOUT_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def vllm_results(recipe: str, *words: str, place: Path) -> dict[str, Any]:
    flags = (*SMALL, "--save-result", "--result-dir", str(place), "--result-filename", "results.json")
    run(Path(VLLM_VENV) / "bin", recipe, *words, *flags, place=place)
    results: dict[str, Any] = json.loads((place / "results.json").read_text())
    return results


def num_handed_off(deployment: Deployment) -> float:
    """Requests whose prompt was computed by the prefiller and whose answer was not."""
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
def test_ais_bench(deployment: Deployment, tmp_path: Path) -> None:
    before = num_handed_off(deployment)
    run(AIS_BENCH.parent, "ais_bench.sh", deployment.url, "tiny", str(deployment.model), place=tmp_path)
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

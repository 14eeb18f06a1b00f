"""The recipes say what the deployments' benchmark commands say, which test_seeds holds against the seeds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load
from engine_adapter.cluster.processes import DeploymentPlan

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "bench" / "recipes"
MODEL_FILE = RECIPES / "ais_bench" / "models" / "vllm_api" / "vllm_api_stream_chat.py"
RECORDER = '#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@"\n[ -z "$ENV_FILE" ] || env > "$ENV_FILE"\n'


class Bench:
    """A recipe, run with stand-ins for the tools that print their words."""

    def __init__(self, place: Path) -> None:
        self.env_file = place / "env"
        self.env = {"PATH": f"{place}:/usr/bin:/bin", "ENV_FILE": str(self.env_file), "http_proxy": "http://web:3128"}
        for tool in ("vllm", "ais_bench"):
            (place / tool).write_text(RECORDER)
            (place / tool).chmod(0o755)

    def run(self, recipe: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(RECIPES / recipe), *words], env=self.env, capture_output=True, text=True, timeout=60
        )

    def argv(self, recipe: str, *words: str) -> list[str]:
        done = self.run(recipe, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.env_file.read_text().splitlines() if "=" in line)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def planned(name: str) -> DeploymentPlan:
    return deployment_plan(load(ROOT / "configs" / "deployments" / f"{name}.toml"))


def bench_argv(plan: DeploymentPlan) -> list[str]:
    assert plan.bench is not None
    return list(plan.bench.argv)


def said(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The program's words and its flags, in any order."""
    text = " ".join(argv)
    program, *flags = re.split(r" (?=--)", text)
    return program.split(), {flag.partition(" ")[0]: flag.partition(" ")[2] for flag in flags}


@pytest.mark.parametrize("name", ["qwen3-235b-ucm-mooncake", "qwq-32b-ucm-mooncake"])
def test_seed_004(bench: Bench, name: str) -> None:
    wanted = said(bench_argv(planned(name)))
    flags = wanted[1]
    url = f"http://{flags['--host']}:{flags['--port']}"
    assert said(bench.argv("vllm_bench_serve.sh", url, flags["--model"])) == wanted


def test_seed_001(bench: Bench) -> None:
    wanted = said(bench_argv(planned("deepseek-r1-2p2d-llmdatadist")))
    flags = wanted[1]
    url = f"http://{flags['--host']}:{flags['--port']}/"
    assert said(bench.argv("benchmark_serving.sh", url, flags["--model"], flags["--tokenizer"])) == wanted


@pytest.mark.parametrize("name", ["deepseek-v3.1-2p1d-mooncake", "deepseek-v3.1-2p1d-layerwise"])
def test_seed_003(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command but for where its files are; and the model file."""
    plan = planned(name)
    assert plan.bench is not None
    text = plan.bench.files[0].text
    assert text is not None
    theirs = settings_of(text, monkeypatch)
    url = f"http://{theirs['host_ip']}:{theirs['host_port']}"
    program, flags = said(bench.argv("ais_bench.sh", url, theirs["model"], theirs["path"]))
    assert flags.pop("--config-dir") == str(RECIPES / "ais_bench")
    assert (program, flags) == said(bench_argv(plan))
    environment = bench.environment()
    assert "http_proxy" not in environment
    assert (Path(environment["AIS_BENCH_DATASETS_CACHE"]) / "ais_bench/datasets/gsm8k/test.jsonl").is_file()
    filled = re.sub(r"\{\{\$(\w+):\}\}", lambda found: environment[found[1]], MODEL_FILE.read_text())
    assert "import" not in filled.replace("imports nothing", "")
    assert settings_of(filled, monkeypatch) == theirs


def settings_of(text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the one model that a model file of ais_bench lists; its type by name."""
    modules: Mapping[str, ModuleType] = {
        name: ModuleType(name) for name in ("ais_bench", "ais_bench.benchmark", "ais_bench.benchmark.models")
    }
    name = "ais_bench.benchmark.models.VLLMCustomAPIChatStream"
    modules["ais_bench.benchmark.models"].__dict__["VLLMCustomAPIChatStream"] = name
    for module, stand_in in modules.items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    names: dict[str, Any] = {}
    exec(text, names)
    (model,) = names["models"]
    return dict(model)


def test_a_planned_model_file_lies_where_ais_bench_looks() -> None:
    """`--config-dir` is configs where nothing else is said, and the command is the seed's."""
    plan = planned("deepseek-v3.1-2p1d-mooncake")
    assert plan.bench is not None
    assert [file.path for file in plan.bench.files] == ["./configs/models/vllm_api/vllm_api_stream_chat.py"]


def test_further_flags_come_last(bench: Bench) -> None:
    for recipe, words in (("vllm_bench_serve.sh", 1), ("benchmark_serving.sh", 2), ("ais_bench.sh", 2)):
        argv = bench.argv(recipe, "http://[::1]:8000", *["a model"] * words, "--num-prompts", "3")
        assert argv[-2:] == ["--num-prompts", "3"]
        assert "a model" in argv or recipe == "ais_bench.sh"


@pytest.mark.parametrize("recipe", ["vllm_bench_serve.sh", "benchmark_serving.sh", "ais_bench.sh"])
def test_a_wrong_call_is_answered_by_one_line(bench: Bench, recipe: str) -> None:
    done = bench.run(recipe, "http://127.0.0.1:8000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: {recipe} URL MODEL")
    for url in ("127.0.0.1:8000", "https://127.0.0.1:8000", "http://127.0.0.1", "http://127.0.0.1:8000/v1"):
        done = bench.run(recipe, url, "m", "t")
        assert done.returncode == 2
        assert done.stderr == f"{recipe}: URL is http://HOST:PORT of the proxy, not '{url}'\n"
    bench.env["PATH"] = "/usr/bin:/bin"
    done = bench.run(recipe, "http://127.0.0.1:8000", "m", "t")
    assert done.returncode == 1
    assert "is not on PATH: " in done.stderr

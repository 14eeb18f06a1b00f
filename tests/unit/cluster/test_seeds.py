"""What the deployments start is what the seed documents start, but for what their comments say, and why.

The documents' own commands are under `seeds/`, extracted by `seeds/extract.py`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load
from engine_adapter.cluster.processes import DeploymentPlan
from tests.unit.cluster.seed_differences import NONE, Difference, differences, said_in
from tests.unit.cluster.seeds.extract import OUTER, extracted, facts_of, lines_of

SEEDS = Path(__file__).parent / "seeds"
DEPLOYMENTS = Path(__file__).parents[3] / "configs" / "deployments"
NAMES = sorted(path.stem for path in SEEDS.glob("*.json"))


def test_every_seed_has_its_deployments() -> None:
    assert {json.loads((SEEDS / f"{name}.json").read_text())["seed"] for name in NAMES} == {f"00{i}" for i in range(5)}
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_the_comment_says_every_difference_and_nothing_else(name: str) -> None:
    path = DEPLOYMENTS / f"{name}.toml"
    found = list(differences(json.loads((SEEDS / f"{name}.json").read_text()), deployment_plan(load(path))))
    lines = said_in(path.read_text())
    unsaid = sorted({str(it) for it in found if not any(line.covers(it) for line in lines)})
    assert not unsaid, "differs from the seed without a word:\n" + "\n".join(unsaid)
    idle = [str(line) for line in lines if not any(line.covers(it) for it in found)]
    assert not idle, "said to differ and does not:\n" + "\n".join(idle)


@pytest.mark.parametrize("name", NAMES)
def test_a_node_is_looked_at_as_the_document_does(name: str) -> None:
    """And with what another document adds: the TLS switch."""
    plan = deployment_plan(load(DEPLOYMENTS / f"{name}.toml"))
    wanted = json.loads((SEEDS / f"{name}.json").read_text()).get("checks", [])
    for checks in plan.checks:
        assert {_commands_in(line) for line in wanted} <= {_commands_in(line) for line in checks.lines}


def _commands_in(line: str) -> str:
    """Without what bash does not care for; a loop over two chips is two commands."""
    line = line.replace("for c in 0 1; do npu-smi info -t spod-info -i $i -c $c; done", BOTH_CHIPS)
    return re.sub(r"\s*;\s*", ";", line)


BOTH_CHIPS = "npu-smi info -t spod-info -i $i -c 0;npu-smi info -t spod-info -i $i -c 1"


def test_the_facts_are_those_of_the_documents() -> None:
    """Where the documents are at hand: SEEDS=DIRECTORY pytest ..."""
    directory = os.environ.get("SEEDS")
    if not directory:
        pytest.skip("SEEDS does not name the seed documents' directory")
    for name, facts in extracted(Path(directory)).items():
        assert (SEEDS / f"{name}.json").read_text() == lines_of(facts)


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_differs_from_its_original_as_it_says(name: str) -> None:
    """The deployment on our connector: same instances, ranks and devices; everything else is said."""
    original = deployment_plan(load(DEPLOYMENTS / f"{name}.toml"))
    path = DEPLOYMENTS / f"{name}-baton.toml"
    twin = deployment_plan(load(path))
    assert [(it.name, it.node, it.dp_ranks, it.devices) for it in twin.processes] == [
        (it.name, it.node, it.dp_ranks, it.devices) for it in original.processes
    ]
    found = list(differences(_as_facts(original), twin))
    lines = said_in(path.read_text())
    unsaid = sorted({str(it) for it in found if not any(line.covers(it) for line in lines)})
    assert not unsaid, "differs from its original without a word:\n" + "\n".join(unsaid)
    idle = [str(line) for line in lines if not any(line.covers(it) for it in found)]
    assert not idle, "said to differ and does not:\n" + "\n".join(idle)


def _as_facts(plan: DeploymentPlan) -> dict[str, Any]:
    processes = {it.name: facts_of(list(it.argv), it.environment(OUTER)) for it in plan.processes if it.kind != "proxy"}
    bench = {"bench": plan.bench.argv} if plan.bench else {}
    return {"processes": processes, "proxy": plan.proxy.argv, "request": plan.request, **bench}


def test_a_difference_is_covered_by_its_own_line_alone() -> None:
    text = "# differs: prefill-* env A, env B: 1 -> *; because\n#   of this\n"
    (line,) = said_in(text)
    assert line.why == "because of this"
    assert line.covers(Difference("prefill-0", "env A", "1", "2"))
    assert line.covers(Difference("prefill-1-dp3", "env B", "1", NONE))
    assert not line.covers(Difference("decode-0", "env A", "1", "2"))
    assert not line.covers(Difference("prefill-0", "env C", "1", "2"))
    assert not line.covers(Difference("prefill-0", "env A", "3", "2"))


def test_a_changed_flag_shows() -> None:
    facts = json.loads((SEEDS / "qwen2.5-vl-1p1d.json").read_text())
    argv = facts["processes"]["prefill-0"]["argv"]
    argv[argv.index("--max-model-len") + 1] = "1"
    found = differences(facts, deployment_plan(load(DEPLOYMENTS / "qwen2.5-vl-1p1d.toml")))
    assert Difference("prefill-0", "--max-model-len", "1", "40000") in set(found)

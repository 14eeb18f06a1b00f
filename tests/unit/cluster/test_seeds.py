"""What the deployments start is what the seed documents start, but for what their comments say, and why.

The documents' own commands are under `seeds/`, extracted by `seeds/extract.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load
from tests.unit.cluster.seed_differences import differences, said_in
from tests.unit.cluster.seeds.extract import extracted, lines_of

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


def test_the_facts_are_those_of_the_documents() -> None:
    """Where the documents are at hand: SEEDS=DIRECTORY pytest ..."""
    directory = os.environ.get("SEEDS")
    if not directory:
        pytest.skip("SEEDS does not name the seed documents' directory")
    for name, facts in extracted(Path(directory)).items():
        assert (SEEDS / f"{name}.json").read_text() == lines_of(facts)

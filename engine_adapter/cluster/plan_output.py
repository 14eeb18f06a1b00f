"""A plan as JSON, for programs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from engine_adapter.cluster.plan import Plan
from engine_adapter.cluster.processes import DeploymentPlan


def as_json(plan: DeploymentPlan, node: str | None = None) -> str:
    """`env` may refer to the outer environment by `${NAME}`, `unset` names what must not be in it."""
    processes = plan.of_node(node) if node else plan.processes
    said: dict[str, Any] = {
        "name": plan.name,
        "nodes": [node] if node else list(plan.nodes),
        "processes": [dataclasses.asdict(process) for process in processes],
        "checks": {checks.node: checks.lines for checks in plan.checks if node in (None, checks.node)},
        "request": plan.request,
        "bench": dataclasses.asdict(plan.bench) if plan.bench else None,
        "templates": [dataclasses.asdict(it) for it in plan.templates if node in (None, it.node)],
    }
    return json.dumps(said, indent=2) + "\n"


def local_as_json(plan: Plan) -> str:
    """Of a cluster on one machine."""
    said = {"name": plan.name, "processes": [dataclasses.asdict(process) for process in plan.processes]}
    return json.dumps(said, indent=2) + "\n"

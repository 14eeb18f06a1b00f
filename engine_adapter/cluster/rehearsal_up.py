"""`pd-cluster up FILE --rehearse`: which engines stand in, which ports are free, the tiny model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from engine_adapter.cluster import machine
from engine_adapter.cluster.child import Guard
from engine_adapter.cluster.config import MadeModel
from engine_adapter.cluster.deployment import Deployment
from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.node_up import Run
from engine_adapter.cluster.processes import DeploymentPlan
from engine_adapter.cluster.rehearsal import (
    MAX_TORCH_INSTANCES,
    Engines,
    Flavour,
    Place,
    Stage,
    aliases,
    contract_of,
    instances,
    left_out,
    places,
    rehearsal,
)
from engine_adapter.cluster.screen import Events
from engine_adapter.cluster.up import make_model
from engine_adapter.cluster.warmup import TIMEOUT_S

NODE = "rehearsal"
CHECKOUT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0


def rehearsal_run(deployment: Deployment, planned: DeploymentPlan, arguments: argparse.Namespace) -> Run:
    """Raises ClusterError where the engines asked for are not to be had."""
    engines = _engines(planned, arguments.engine or "auto")
    model = model_of(deployment)
    model_dir = arguments.dir / "models" / f"{model.family}-{model.size}"
    env = dict(machine.environment())
    if engines == "mock":
        env["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [env.get("PYTHONPATH")])])
    wanted = list(places(planned, engines))
    moved = _moved([(host, port) for _, host, port in wanted])
    served_name = deployment.model.served_name or deployment.model.path
    flavour: Flavour = "baton" if deployment.connector.name == "BatonConnector" else "nixl"
    command = (sys.executable, "-m", "bench.mock_engine")
    share = rehearsal(planned, served_name, Stage(engines, str(model_dir), command, env, moved, flavour))
    run_dir = arguments.dir / "run" / planned.name / NODE
    return Run(
        share=share,
        source=arguments.file.absolute(),
        node=NODE,
        run_dir=run_dir,
        log_dir=arguments.log_dir or run_dir,
        ports=[(owner, host, moved.get((host, port), port)) for owner, host, port in wanted],
        env=env,
        start_timeout_s=min(arguments.start_timeout_s, START_TIMEOUT_S),
        stop_timeout_s=arguments.stop_timeout_s,
        num_prompts=arguments.warm_up_prompts,
        prompt_timeout_s=TIMEOUT_S,
        once=arguments.once,
        notes=_notes(planned, engines, moved, model),
        prepare=partial(_make_model, model, model_dir, run_dir) if engines == "torch" else None,
    )


def model_of(deployment: Deployment) -> MadeModel:
    """A tiny one of the deployment's kind: with eyes where its request has an image, with experts where ep is said."""
    if "image_url" in json.dumps(deployment.request.body):
        return MadeModel(family="qwen2_5_vl", size="tiny")
    sizes = [deployment.prefill.ep, deployment.decode.ep, *(one.ep for one in deployment.instance)]
    return MadeModel(family="qwen3_moe" if any((ep or 1) > 1 for ep in sizes) else "qwen3", size="tiny")


def _engines(planned: DeploymentPlan, asked: str) -> Engines:
    has_torch, has_mock = importlib.util.find_spec("torch") is not None, (CHECKOUT / "bench/mock_engine.py").is_file()
    few = len(instances(planned)) <= MAX_TORCH_INSTANCES and contract_of(planned) == "pull"
    if asked == "torch" or (asked == "auto" and few and has_torch):
        if not has_torch:
            raise ClusterError("--engine torch: torch is not installed; pip install 'pd-baton[engine]'")
        return "torch"
    if not has_mock:
        raise ClusterError(
            "the mock engine (bench/mock_engine.py) comes with a checkout of the repository, not with the package; "
            "rehearse from a checkout, or give --engine torch"
        )
    return "mock"


def _moved(wanted: Sequence[Place]) -> dict[Place, int]:
    """For every port that is taken here, another that is not."""
    chosen = set(wanted)
    moved = {}
    for host, port in dict.fromkeys(wanted):
        if machine.port_problem(host, port) is None:
            continue
        free = (it for it in machine.CHOSEN_PORTS if (host, it) not in chosen and not machine.port_problem(host, it))
        moved[host, port] = next(free, port)
        chosen.add((host, moved[host, port]))
    return moved


def _notes(planned: DeploymentPlan, engines: Engines, moved: dict[Place, int], model: MadeModel) -> list[str]:
    where = ", ".join(f"{node} is {alias}" for node, alias in aliases(planned).items())
    num, contract = len(instances(planned)), contract_of(planned)
    what = f"torch_engine, {model.size} {model.family}" if engines == "torch" else "mock engines in one process"
    notes = [f"a rehearsal: {where}", f"{num} API servers are {what}; environment and engine flags are not tried"]
    if engines == "torch" and contract != "pull":
        notes.append(f"torch_engine hands KV over by contract pull; the plan's {contract} is not tried (--engine mock)")
    if left_out(planned):
        notes.append(f"not started: {', '.join(left_out(planned))}")
    return notes + [f"port {port} of {host} is taken here: {other} instead" for (host, port), other in moved.items()]


async def _make_model(model: MadeModel, model_dir: Path, log_dir: Path, guard: Guard, screen: Events) -> None:
    if not (model_dir / "config.json").is_file():
        await make_model(("pd-engine",), model_dir, model, log_dir, guard, screen)

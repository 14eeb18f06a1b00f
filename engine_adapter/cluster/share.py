"""A node's share of a deployment's plan, or all of it, as the supervisor takes it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine_adapter.cluster.plan import Kind, Plan, PlannedProcess
from engine_adapter.cluster.processes import DeploymentPlan, File, Process

KINDS: dict[str, Kind] = {"store": "store", "engine": "engine", "proxy": "proxy"}


@dataclass(frozen=True, slots=True)
class Share(Plan):
    """`processes` are started here; of the other nodes' only those that one of them comes after are looked at."""

    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Their ready URLs by name."""
    files: tuple[File, ...] = ()
    to_prompt: Mapping[str, str] = field(default_factory=dict)
    """HOST:PORT of every API server here, by name: each gets its own first prompts."""
    proxy_address: str = ""
    """HOST:PORT of the proxy if it is here."""
    num_prefillers: int = 0
    """The proxy's."""

    def stop_stages(self) -> list[tuple[PlannedProcess, ...]]:
        """The proxy drains first; a decoder may still pull from a prefiller, and both use the store."""
        engines = self.of_kind("engine")
        decoders = tuple(process for process in engines if process.role == "decode")
        others = tuple(process for process in engines if process.role != "decode")
        return [self.of_kind("proxy"), decoders, others, self.of_kind("store")]


def share_of(plan: DeploymentPlan, node: str, served_name: str, outer: Mapping[str, str]) -> Share:
    """Of one node. `outer` is the environment that its processes' own is put on top of."""
    mine = plan.of_node(node)
    here = {process.name for process in mine}
    after = dict.fromkeys(name for process in mine for name in process.after if name not in here)
    return Share(
        name=plan.name,
        served_name=served_name,
        processes=tuple(_planned(plan, process, outer) for process in mine),
        elsewhere={name: plan.named(name).ready_url for name in after},
        files=tuple(dict.fromkeys(file for process in mine for file in process.files)),
        to_prompt={process.name: process.serves for process in mine if process.kind == "engine" and process.serves},
        proxy_address=next((process.serves for process in mine if process.kind == "proxy"), ""),
        num_prefillers=sum(1 for process in plan.processes if process.role == "prefill" and process.serves),
    )


def _planned(plan: DeploymentPlan, process: Process, outer: Mapping[str, str]) -> PlannedProcess:
    port = int(process.serves.rpartition(":")[2]) if process.serves else 0
    return PlannedProcess(
        name=process.name,
        kind=KINDS[process.kind],
        role=process.role or process.kind,
        argv=process.argv,
        host=process.node,
        port=port,
        ports=tuple(port for port, _ in process.ports),
        health_url=ready_url(plan, process),
        metrics_url=f"http://{process.serves}/metrics" if process.serves else "",
        after=process.after,
        env={"PYTHONUNBUFFERED": "1", **process.environment(outer)},
    )


def ready_url(plan: DeploymentPlan, process: Process) -> str:
    """A headless engine is as well as the API server of its instance."""
    if process.ready_url:
        return process.ready_url
    return next(it.ready_url for it in plan.processes if it.instance == process.instance and it.ready_url)


def listens_on(process: Process) -> str:
    """The address its ports must be free on: engines take them on all."""
    if process.kind == "proxy":
        return process.argv[process.argv.index("--host") + 1]
    return "::" if ":" in process.node else "0.0.0.0"

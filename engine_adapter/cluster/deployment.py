"""A deployment over several nodes, as one TOML file says it: nodes, instances, model, connector, engine, store, proxy.

Declared here once, frozen. What follows from it (ranks, devices, ports, engine ids, commands) is computed by
`deployment_plan`; what can't be true of it is said by `deployment_rules`. A file is one of these if it has a
`[[node]]`; a file without is a cluster on one machine, see `config`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from engine_adapter.cluster.errors import ClusterError, ConfigError
from engine_adapter.cluster.toml_mistakes import (
    FLAG_PATTERN,
    HOST_PATTERN,
    NAME_PATTERN,
    NIC_PATTERN,
    PATH_PATTERN,
    TEXT_PATTERN,
    VARIABLE_PATTERN,
    VERSION_PATTERN,
    Where,
    lines_of,
    without,
)

RoleName = Literal["prefill", "decode"]
EngineKind = Literal["vllm-ascend", "vllm", "torch"]
Hardware = Literal["A2", "A3", "gpu", "cpu"]

ROLES: tuple[RoleName, ...] = ("prefill", "decode")

Args = dict[Annotated[str, Field(pattern=FLAG_PATTERN)], JsonValue]
"""Flags of a command without their dashes, `{max-num-seqs = 8}`. true: the bare flag; false: not even the role's
default; a list: several words; a table: JSON."""

Json = dict[str, JsonValue]

Env = dict[Annotated[str, Field(pattern=VARIABLE_PATTERN)], str | int | Literal[False]]
"""false: unset. `${NAME}` in a value is what NAME was before; where it was not set, a colon beside it goes, too."""

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1, le=4096)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]
Host = Annotated[str, Field(pattern=HOST_PATTERN, max_length=253)]
Text = Annotated[str, Field(min_length=1, pattern=TEXT_PATTERN)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Node(Section):
    address: Host
    nic: Annotated[str, Field(pattern=NIC_PATTERN)] = "eth0"
    devices: Count = 8
    """Chips: 8 of an A2 server, 16 of an A3 server."""
    hardware: Hardware = "A2"
    device_ips: tuple[str, ...] = ()
    """Of every chip, from chip 0, for the rank table; if not said, `pd-cluster ranktable` asks hccn_tool."""
    super_pod_id: str = ""
    super_device_ids: tuple[str, ...] = ()


class Role(Section):
    """What all instances of a role have in common; an instance may say otherwise."""

    dp: Count = 1
    """Data-parallel ranks, over all nodes of an instance."""
    tp: Count = 1
    pp: Count = 1
    ep: Count | None = None
    """Expert parallelism: dp * tp turns it on, 1 turns it off, not said leaves it to the engine."""
    dp_mode: Literal["external", "internal"] = "external"
    """external: one process and one API server a rank, the proxy balances. internal: one process a node, the first
    one serves for all, the others are headless."""
    env: Env = {}
    args: Args = {}


class Instance(Section):
    role: RoleName
    nodes: Annotated[tuple[Host, ...], Field(min_length=1)]
    """Addresses; the data-parallel ranks are shared out evenly, in this order."""
    count: Count = 1
    """So many like this on the same nodes."""
    dp: Count | None = None
    tp: Count | None = None
    pp: Count | None = None
    ep: Count | None = None
    devices: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Chips it takes on each of its nodes; if not said, the first free ones."""
    port: Port | None = None
    """HTTP, of the first process on each of its nodes; the next ones follow by one."""
    kv_port: Port | None = None
    dp_rpc_port: Port | None = None
    env: Env = {}
    args: Args = {}


class Ports(Section):
    """Where numbering begins on each node, for what the instances don't say themselves."""

    http: Port = 13700
    kv: Port = 36000
    """Above ADXL's 20000-35999 of a node with 16 chips."""
    dp_rpc: Port = 12321
    llmdatadist: Port = 5557
    """LLMDataDist's listening ports (VLLM_ASCEND_LLMDD_RPC_PORT)."""
    sidecar_metrics: Port = 39000


class Model(Section):
    path: Text
    served_name: Text | None = None
    """What clients call it; the path if not said, as vLLM has it."""


class Connector(Section):
    name: Text
    """MooncakeConnectorV1, MooncakeLayerwiseConnector, LLMDataDistCMgrConnector, NixlConnector, BatonConnector, ..."""
    extra: Json = {}
    """Further keys of kv_connector_extra_config."""
    config: Json = {}
    """Further keys of --kv-transfer-config."""
    module_path: bool = False
    """Say kv_connector_module_path also where the engine knows the connector by its name."""
    rank_table: Text = "./ranktable.json"
    """Where LLMDataDist reads it, on every node."""


class Engine(Section):
    kind: EngineKind
    engine_version: Annotated[str, Field(pattern=VERSION_PATTERN)]
    """Of vllm-ascend, vllm or pd-baton; it selects arguments, names and module paths, see `versions`."""
    env: Env = {}
    args: Args = {}


class MooncakeMaster(Section):
    """Of the Mooncake store; a Mooncake connector does not need it."""

    node: Host
    port: Port = 50088
    metrics_port: Port = 9003
    """Mooncake's default; it binds it whether or not anybody asks."""
    env: Env = {}
    args: Args = {}
    config: Json = {}
    """Further keys of mooncake.json."""


class Store(Section):
    """The prefix store of the prefillers."""

    kind: Literal["ucm"]
    directory: str = ""
    """Shared by all nodes that prefill: NFS, 3FS."""
    pipeline: Text = "Cache|Posix"
    cache_buffer_gb: Annotated[int, Field(ge=1)] = 64
    """Of each process, in /dev/shm."""
    event_sync: bool = True
    layerwise: bool = True
    config_path: Text = "./ucm_config.yaml"


class Proxy(Section):
    node: Host
    host: Host | None = None
    """To listen on; the node's address if not said."""
    port: Port = 8000
    args: Args = {}


class Request(Section):
    """What shows that it works; `model` is added."""

    path: Annotated[str, Field(pattern=PATH_PATTERN)] = "/v1/completions"
    body: Json = {"prompt": "Who are you?", "max_tokens": 100, "temperature": 0}


class Bench(Section):
    tool: Literal["vllm", "ais_bench"] = "vllm"
    args: Args = {}
    """vllm: flags of `vllm bench serve`. ais_bench: flags of its command."""
    model: Json = {}
    """ais_bench: further keys of its model file."""


class Deployment(Section):
    name: Name
    node: Annotated[tuple[Node, ...], Field(min_length=1)]
    model: Model
    engine: Engine
    connector: Connector
    prefill: Role = Role()
    decode: Role = Role()
    instance: tuple[Instance, ...] = ()
    ports: Ports = Ports()
    store: Store | None = None
    mooncake_master: MooncakeMaster | None = None
    proxy: Proxy
    request: Request = Request()
    bench: Bench | None = None

    def role(self, name: RoleName) -> Role:
        return self.prefill if name == "prefill" else self.decode

    def engine_sections(self) -> list[tuple[str, Engine | Role | Instance]]:
        """Everywhere the file gives engines flags and environment, with the key of the place."""
        instances = [(f"instance[{index}]", spec) for index, spec in enumerate(self.instance)]
        return [("engine", self.engine), ("prefill", self.prefill), ("decode", self.decode), *instances]


OWN_SECTIONS = ("nodes", "connector", "prefill", "decode")
"""What no cluster on one machine has, nor a deployment without its nodes: `[[nodes]]` is a slip of the pen."""


def is_deployment(text: str) -> bool:
    """Whether a file is one of these, and not a cluster on one machine (or no TOML, which its reader will say)."""
    try:
        sections = tomllib.loads(text).keys()
    except tomllib.TOMLDecodeError:
        return False
    return "node" in sections or ("cluster" not in sections and not sections.isdisjoint(OWN_SECTIONS))


@dataclass(frozen=True, slots=True)
class Reading:
    deployment: Deployment
    lines: tuple[str, ...] = ()
    """One for each unknown key and each wrong value; they are left out of the deployment."""
    wrong: tuple[Where, ...] = ()
    """Where the wrong values are: the deployment has defaults there that the file does not say."""


def read(text: str, source: str) -> Reading:
    """Raises ConfigError where too much is wrong to say what else is."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not TOML: {error}") from error
    try:
        return Reading(Deployment.model_validate(values))
    except ValidationError as error:
        details = error.errors()
    lines = [f"{source}: {line}" for line in lines_of(values, details, Deployment)]
    unknown = {detail["loc"] for detail in details if detail["type"] == "extra_forbidden"}
    rest, places = without(values, details)
    try:
        deployment = Deployment.model_validate(rest)
    except ValidationError:  # something that it cannot be without
        raise ConfigError(*lines) from None
    return Reading(deployment, tuple(lines), tuple(place for place in places if place not in unknown))


def text_of(path: Path) -> str:
    """Raises ClusterError."""
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); write it as UTF-8") from error
    except OSError as error:
        raise ClusterError(
            f"{path}: {error.strerror}; deployments are under configs/deployments/, local ones under configs/examples/"
        ) from error

"""One TOML file says a deployment. Declared here once, frozen, and nothing in it is guessed.

What follows from the file (addresses, ids, commands) is computed by `plan`; what depends on the machine (free ports,
a model that is there) is looked at by `machine`.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from engine_adapter.cluster.errors import ClusterError, ConfigError
from engine_adapter.cluster.toml_mistakes import line_of

ArgValue = bool | int | float | str | list[int | float | str]
Args = dict[str, ArgValue]
"""Further flags of a command: `{kv-lease-s = 30, log-level = "debug"}`. true: the bare flag; false: nothing."""

Port = Annotated[int, Field(ge=0, le=65535)]
"""0: a free one is chosen when the plan is made, and kept while the cluster is up."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Words = Annotated[tuple[str, ...], Field(min_length=1)]

COMPUTED_ARGS = {
    "engine": (
        "model", "served-model-name", "role", "host", "port", "device", "dtype", "sidecar", "engine-id",
        "max-model-len", "block-size", "num-blocks", "kv-pool-bytes", "num-threads",
    ),
    "sidecar": (
        "socket", "listen", "engine-id", "rank", "transport", "metrics-port", "store-memory-bytes", "store-dir",
        "store-dir-bytes", "store-mooncake", "store-mooncake-segment-bytes",
    ),
    "proxy": (
        "host", "port", "policy", "prefiller-hosts", "prefiller-ports", "prefiller-port",
        "decoder-hosts", "decoder-ports", "decoder-port",
    ),
}  # fmt: skip
"""Flags the plan writes itself: in `args` they would be given twice."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ClusterSection(Section):
    name: Name = "baton"
    host: str = "127.0.0.1"
    start_timeout_s: float = Field(default=300.0, gt=0)
    """For one process to become healthy after it was started."""
    stop_timeout_s: float = Field(default=35.0, gt=0)
    """For one process to end by itself after SIGTERM; then SIGKILL. The proxy drains for 30 s at most."""


class MadeModel(Section):
    """A model with seeded random weights, written by `pd-engine make-model` where it is absent."""

    family: Literal["qwen3", "qwen2", "llama", "qwen3_moe", "qwen2_5_vl"] = "qwen3"
    size: Literal["tiny", "small"] = "small"
    seed: int = Field(default=0, ge=0)


class ModelSection(Section):
    path: str | None = None
    """A Hugging Face directory; relative to where the command runs."""
    make: MadeModel | None = None
    served_name: str | None = None
    """What clients call the model; the directory's name if not said."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class EngineSection(Section):
    kind: Literal["torch"] = "torch"
    device: str = "cpu"
    block_size: int = Field(default=16, ge=1)
    num_blocks: int | None = Field(default=None, ge=1)
    kv_pool: ByteSize | None = None
    """Bytes of KV cache an instance, with a unit: "256MiB". This or `num_blocks`; 256 MiB if neither."""
    max_model_len: int | None = Field(default=None, ge=1)
    num_threads: int = Field(default=0, ge=0)
    """0: the machine's cores, shared out among the engines, at least one each."""
    args: Args = {}


class SidecarSection(Section):
    transport: Literal["auto", "shm", "tcp", "mooncake"] = "auto"
    port: Port = 0
    """Where peers reach the first instance's sidecar; the next ones follow by one."""
    metrics_port: Port = 0
    args: Args = {}


class StoreSection(Section):
    """The prefix store behind every prefiller: where finished KV blocks are kept. Nothing said: none."""

    memory: ByteSize | None = None
    """Host memory an instance: "4GiB"."""
    dir: str | None = None
    """An absolute path that the prefillers share, and other machines may too."""
    dir_size: ByteSize | None = None
    """What `dir` may hold; pd-sidecar's own default if not said."""
    mooncake: str | None = None
    """HOST:PORT of a mooncake_master that runs already."""
    mooncake_segment: ByteSize | None = None
    """Host memory an instance gives to Mooncake Store; pd-sidecar's own default if not said."""


class ProxySection(Section):
    host: str | None = None
    """`cluster.host` if not said."""
    port: Port = 8000
    policy: str | None = None
    args: Args = {}


class Instance(Section):
    role: Literal["prefill", "decode"]
    count: int = Field(default=1, ge=1, le=1024)
    port: Port = 0
    """Of the first one; the next ones follow by one."""
    args: Args = {}
    """On top of `engine.args`, which it overrides."""


class Commands(Section):
    """The command each part is started with: words, the first looked up on PATH."""

    engine: Words = ("pd-engine",)
    sidecar: Words = ("pd-sidecar",)
    proxy: Words = ("pd-proxy",)


class ClusterConfig(Section):
    cluster: ClusterSection = ClusterSection()
    model: ModelSection
    engine: EngineSection = EngineSection()
    sidecar: SidecarSection = SidecarSection()
    store: StoreSection = StoreSection()
    proxy: ProxySection = ProxySection()
    instance: tuple[Instance, ...] = ()
    commands: Commands = Commands()


def load(path: Path) -> ClusterConfig:
    """Read and check a deployment file.

    Raises ConfigError (written wrongly; all mistakes at once) or ClusterError (absent, or at odds with itself).
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; examples are under configs/examples/") from error
    return parse(text, str(path))


def parse(text: str, source: str) -> ClusterConfig:
    try:
        config = ClusterConfig.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(*(f"{source}: {line_of(detail, ClusterConfig)}" for detail in error.errors())) from error
    misplaced = _misplaced_args(config)
    if misplaced:
        raise ConfigError(*(f"{source}: {line}" for line in misplaced))
    return _consistent(config, source)


def with_flags(config: ClusterConfig, source: str, *, model_dir: str | None, port: int | None) -> ClusterConfig:
    """The file with what the command line says instead of it. Raises as `load` does."""
    sections = config.model_dump()
    if model_dir is not None:
        sections["model"] = {"path": model_dir, "dtype": config.model.dtype}
    if port is not None:
        sections["proxy"]["port"] = port
    try:
        return _consistent(ClusterConfig.model_validate(sections), source)
    except ValidationError as error:
        raise ConfigError(*(f"{source}: {line_of(detail, ClusterConfig)}" for detail in error.errors())) from error


def _consistent(config: ClusterConfig, source: str) -> ClusterConfig:
    odd = _inconsistencies(config)
    if odd:
        raise ClusterError(*(f"{source}: {line}" for line in odd))
    return config


def _misplaced_args(config: ClusterConfig) -> list[str]:
    places = [
        ("engine.args", "engine", config.engine.args),
        ("sidecar.args", "sidecar", config.sidecar.args),
        ("proxy.args", "proxy", config.proxy.args),
        *((f"instance[{i}].args", "engine", instance.args) for i, instance in enumerate(config.instance)),
    ]
    return [
        f'"{place}.{key}" is computed by the plan; say it by its own key instead'
        for place, command, args in places
        for key in args
        if key.strip("-").replace("_", "-") in COMPUTED_ARGS[command]
    ]


def _inconsistencies(config: ClusterConfig) -> list[str]:
    roles = {group.role for group in config.instance}
    odd = [
        f'no {name}; add an [[instance]] with role = "{role}"'
        for role, name in (("prefill", "prefiller"), ("decode", "decoder"))
        if role not in roles
    ]
    if (config.model.path is None) == (config.model.make is None):
        odd.append("give model.path or model.make, one of the two")
    if config.engine.num_blocks and config.engine.kv_pool:
        odd.append("give engine.num_blocks or engine.kv_pool, one of the two")
    odd += _store_inconsistencies(config.store)
    taken = Counter(port for port, _ in fixed_ports(config))
    for port in sorted(port for port, times in taken.items() if times > 1):
        whose = ", ".join(owner for fixed, owner in fixed_ports(config) if fixed == port)
        odd.append(f"port {port} is used more than once ({whose}); give one of them another, or 0 to have one chosen")
    odd += [f"port {port} ({owner}) is over 65535; begin lower" for port, owner in fixed_ports(config) if port > 65535]
    return odd


def _store_inconsistencies(store: StoreSection) -> list[str]:
    odd = []
    if store.dir is not None and not Path(store.dir).is_absolute():
        odd.append(f'store.dir = "{store.dir}" is no absolute path; begin it with /')
    if store.dir_size is not None and store.dir is None:
        odd.append("store.dir_size is the size of store.dir; give that too, or neither")
    if store.mooncake_segment is not None and store.mooncake is None:
        odd.append("store.mooncake_segment is for store.mooncake; give that too, or neither")
    return odd


def fixed_ports(config: ClusterConfig) -> list[tuple[int, str]]:
    """Every port the file fixes, and whose it is."""
    fixed = [(config.proxy.port, "proxy")] if config.proxy.port else []
    for group in config.instance:
        if group.port:
            fixed += [(group.port + i, group.role) for i in range(group.count)]
    num_instances = sum(group.count for group in config.instance)
    for first, owner in ((config.sidecar.port, "sidecar"), (config.sidecar.metrics_port, "sidecar metrics")):
        if first:
            fixed += [(first + i, owner) for i in range(num_instances)]
    return fixed

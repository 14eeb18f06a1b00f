"""What `kv_connector_extra_config` may say, and what can't work together. Pure."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_adapter.cluster.connectors import MOONCAKE_PORTS
from engine_adapter.vllm_connector.errors import ConnectorStartError
from engine_adapter.vllm_connector.store_settings import StoreSettings, store_from

__all__ = ["ConnectorSettings", "ConnectorStartError", "check_ports", "listen_of", "settings_from", "socket_of"]

ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}
"""vLLM's kv_role, and the instance's role in our terms."""


CONTRACTS = ("pull", "layerwise")
MEMORY = ("auto", "shm", "staging", "in_process", "device_ipc")


@dataclass(frozen=True, slots=True)
class ConnectorSettings:
    """Each field is a key of `kv_connector_extra_config`. Times are seconds."""

    sidecar: str = "auto"
    """auto: each worker starts its own; else the unix socket of a running one, with {rank} where there are several."""
    listen: str = "127.0.0.1:0"
    """HOST:PORT where other sidecars connect; rank r takes PORT + r. Port 0 takes any."""
    transport: str = "auto"
    metrics_port: int = 0
    """Of rank 0; rank r takes the r-th after it. 0 takes any."""
    contract: str = "pull"
    """layerwise: KV is also pushed, layer by layer while it is computed, where the proxy asks for that."""
    lease_s: float = 30.0
    """How long a prefiller keeps KV that no decoder fetches."""
    pull_timeout_s: float = 30.0
    """After this a load has failed."""
    push_timeout_s: float = 120.0
    """After this nobody has pushed a prompt's KV here: its load has failed. It covers the prefiller's queue."""
    memory: str = "auto"
    """How the sidecar gets at the KV: shm, staging, in_process or device_ipc; auto: the first that works here."""
    staging_bytes: int = 256 << 20
    """Size of the buffer that KV goes through where it is staged; kv_both gives half to either direction."""
    role: str = ""
    """prefill, decode or both; only checked against kv_role."""
    log_level: str = "INFO"
    store: StoreSettings | None = None
    """The prefix store, see store_settings.py; None for an engine without one."""


def settings_from(kv_role: str, extra: Mapping[str, Any]) -> ConnectorSettings:
    """Check and read the extra config. Raises ConnectorStartError."""
    if kv_role not in ROLES:
        raise ConnectorStartError(f"kv_role is {kv_role!r}; give one of {', '.join(ROLES)}")
    fields = {field.name: field for field in dataclasses.fields(ConnectorSettings)}
    for key, value in extra.items():
        if key not in fields:
            near = difflib.get_close_matches(key, list(fields), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise ConnectorStartError(f"kv_connector_extra_config.{key} is not a key of BatonConnector; {hint}")
        if key != "store":
            _check_type(key, value, fields[key].default)
    asked = dict(extra)
    if (store := asked.pop("store", None)) is not None:
        asked["store"] = store_from(kv_role, asked.get("sidecar", "auto"), store)
    settings = ConnectorSettings(**asked)
    _check_values(kv_role, settings)
    return settings


def _check_type(key: str, value: object, default: object) -> None:
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ConnectorStartError(f"kv_connector_extra_config.{key} is {value!r}, it must be like {default!r}")


def _check_values(kv_role: str, settings: ConnectorSettings) -> None:
    role = ROLES[kv_role]
    if settings.role and settings.role not in ROLES.values():
        raise ConnectorStartError(f"kv_connector_extra_config.role is {settings.role!r}; give prefill, decode or both")
    if settings.role and role != "both" and settings.role != role:
        right = next(name for name, ours in ROLES.items() if ours == settings.role)
        raise ConnectorStartError(
            f'kv_role "{kv_role}" contradicts kv_connector_extra_config.role "{settings.role}"; give kv_role "{right}"'
        )
    if settings.memory not in MEMORY:
        near = difflib.get_close_matches(settings.memory, MEMORY, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConnectorStartError(
            f"kv_connector_extra_config.memory is {settings.memory!r}, none of {', '.join(MEMORY)}{hint}"
        )
    if settings.contract not in CONTRACTS:
        near = difflib.get_close_matches(settings.contract, CONTRACTS, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConnectorStartError(
            f"kv_connector_extra_config.contract is {settings.contract!r}, none of {', '.join(CONTRACTS)}{hint}"
        )
    if settings.staging_bytes < 1:
        raise ConnectorStartError("kv_connector_extra_config.staging_bytes must be at least 1")
    for key in ("lease_s", "pull_timeout_s", "push_timeout_s"):
        if not 0 < getattr(settings, key) <= 3600:
            raise ConnectorStartError(f"kv_connector_extra_config.{key} must be above 0 and at most 3600")
    host, _, port = settings.listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConnectorStartError(f"kv_connector_extra_config.listen is {settings.listen!r}; give it as HOST:PORT")
    if not 0 <= settings.metrics_port < 65536:
        raise ConnectorStartError("kv_connector_extra_config.metrics_port must be between 0 and 65535")


def check_ports(settings: ConnectorSettings, num_ranks: int) -> None:
    """The ports of all ranks' sidecars, for those this connector starts. Raises ConnectorStartError."""
    if settings.sidecar != "auto":
        return
    listen = int(settings.listen.rpartition(":")[2])
    for key, first in (("listen", listen), ("metrics_port", settings.metrics_port)):
        ports = range(first, first + num_ranks)
        if first and ports[-1] > 65535:
            raise ConnectorStartError(
                f"kv_connector_extra_config.{key}: {num_ranks} ranks take the ports {first}-{ports[-1]}, which go "
                f"beyond 65535; give at most {65536 - num_ranks}"
            )
        overlap = first <= MOONCAKE_PORTS[-1] and ports[-1] >= MOONCAKE_PORTS[0]
        if first and settings.transport == "mooncake" and overlap:
            raise ConnectorStartError(
                f"kv_connector_extra_config.{key}: the ports {first}-{ports[-1]} of {num_ranks} rank(s) overlap the "
                f"{MOONCAKE_PORTS[0]}-{MOONCAKE_PORTS[-1]} that Mooncake takes at random; give one from "
                f"{MOONCAKE_PORTS[-1] + 1} on"
            )
    if listen and settings.metrics_port and abs(listen - settings.metrics_port) < num_ranks:
        raise ConnectorStartError(
            f"kv_connector_extra_config.listen and .metrics_port: {num_ranks} rank(s) from {listen} and from "
            f"{settings.metrics_port} on overlap; give them {num_ranks} ports of distance"
        )


def listen_of(settings: ConnectorSettings, rank: int) -> str:
    """Where rank's sidecar listens."""
    host, _, port = settings.listen.rpartition(":")
    return f"{host}:{int(port) + rank if int(port) else 0}"


def socket_of(settings: ConnectorSettings, engine_id: str, rank: int, uid: int) -> Path:
    """The unix socket of rank's sidecar: every process of an engine comes to the same answer."""
    if settings.sidecar != "auto":
        return Path(settings.sidecar.replace("{rank}", str(rank)))
    name = hashlib.sha256(f"{engine_id}/{rank}".encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"baton-{uid}" / f"{name}.sock"

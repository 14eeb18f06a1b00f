"""The engine's connection to its sidecar: made at start, let go at the end, asked for health in between."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from engine_adapter.sidecar_process import OwnSidecar, SidecarCommand, SidecarStartError
from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.kv_transfer import PullResult
from engine_adapter.torch_engine.kv_transfer_meter import MeteredKvTransfer
from engine_adapter.torch_engine.server_config import ServerConfig
from engine_adapter.torch_engine.sidecar_kv_transfer import SidecarKvTransfer
from sidecar.errors import SidecarError


@dataclass(frozen=True, slots=True)
class KvLink:
    """`transfer` is None for an engine that hands no KV on."""

    socket_path: str
    transfer: SidecarKvTransfer | None = None

    @property
    def available(self) -> bool:
        """False while the sidecar is away."""
        return self.transfer is None or self.transfer.available


@contextmanager
def build_kv_transfer(
    config: ServerConfig, engine: Engine, observe_pull: Callable[[PullResult], None]
) -> Iterator[KvLink]:
    """Give the engine its KvTransfer, if it is to have one, and with `auto` a sidecar of its own.

    The engine closes the transfer when it ends; the sidecar ends after it. Raises EngineStartError.
    """
    if config.sidecar == "none":
        yield KvLink("none")
        return
    with ExitStack() as stack:
        socket_path = config.sidecar
        if config.sidecar == "auto":
            own = OwnSidecar(_command(config))
            stack.callback(own.stop)
            socket_path = _start(own)
        transfer = _connect(config, engine, socket_path)
        engine.set_kv_transfer(MeteredKvTransfer(transfer, observe_pull))
        stack.callback(transfer.close)
        yield KvLink(socket_path, transfer)


def _command(config: ServerConfig) -> SidecarCommand:
    return SidecarCommand(
        engine_id=config.engine_id or f"engine-{uuid.uuid4().hex[:12]}",
        listen=config.sidecar_listen,
        transport=config.sidecar_transport,
        metrics_port=config.sidecar_metrics_port,
        log_level=config.log_level,
    )


def _start(own: OwnSidecar) -> str:
    try:
        own.start()
    except SidecarStartError as error:
        raise EngineStartError(str(error), "see --sidecar-listen and --sidecar-transport") from error
    return own.socket_path


def _connect(config: ServerConfig, engine: Engine, socket_path: str) -> SidecarKvTransfer:
    if engine.pool_fd is None:
        raise EngineStartError(
            "the KV pool is in device memory, which no sidecar here can reach",
            "give --sidecar none",
        )
    transfer = SidecarKvTransfer(
        socket_path,
        engine.pool_fd,
        engine.kv_layout(),
        lease_s=config.kv_lease_s,
        pull_timeout_s=config.kv_pull_timeout_s,
        wake=engine.wake,
        push_timeout_s=config.kv_push_timeout_s,
    )
    try:
        transfer.start()
    except (SidecarError, OSError) as error:
        raise EngineStartError(
            f"no KV transfer through the sidecar at {socket_path} ({error})",
            "start pd-sidecar there, or give --sidecar auto",
        ) from error
    return transfer

"""The engine's connection to its sidecar: made at start, let go at the end, asked for health in between."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from engine_adapter.memory.choice import Choice
from engine_adapter.sidecar_process import OwnSidecar, SidecarCommand, SidecarStartError
from engine_adapter.sidecar_thread import SidecarThread
from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.kv_memory import KvMemory
from engine_adapter.torch_engine.kv_transfer import PullResult
from engine_adapter.torch_engine.kv_transfer_meter import MeteredKvTransfer
from engine_adapter.torch_engine.prefix_store import LoadResult
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
    config: ServerConfig,
    engine: Engine,
    observe_pull: Callable[[PullResult], None],
    observe_load: Callable[[LoadResult], None],
    choice: Choice | None,
) -> Iterator[KvLink]:
    """Give the engine its KvTransfer, if it is to have one (`choice`), and with `auto` a sidecar of its own.

    The engine closes the transfer when it ends; the sidecar ends after it. Raises EngineStartError.
    """
    _check_store(config, choice)
    if choice is None:
        yield KvLink("none")
        return
    with ExitStack() as stack:
        socket_path = config.sidecar
        memory = KvMemory(config, engine, choice)
        stack.callback(memory.close)
        if config.sidecar == "auto":
            own = SidecarThread(_command(config)) if choice.provider.in_process else OwnSidecar(_command(config))
            stack.callback(own.stop)
            socket_path = _start(own)
        news = threading.Event()

        def wake() -> None:
            news.set()
            engine.wake()

        transfer = _connect(config, memory, socket_path, wake, observe_load)
        engine.set_kv_transfer(MeteredKvTransfer(memory.staged(transfer, news, wake), observe_pull))
        if not choice.stages:
            engine.set_prefix_store(transfer.store)
        stack.callback(transfer.close)
        yield KvLink(socket_path, transfer)


def _store_flags(config: ServerConfig) -> dict[str, str]:
    """What the sidecar is told of the prefix store."""
    segment_bytes = config.store_mooncake_segment_bytes
    flags = {
        "--store-memory-bytes": str(config.store_memory_bytes or ""),
        "--store-dir": config.store_dir or "",
        "--store-dir-bytes": str(config.store_dir_bytes or ""),
        "--store-mooncake": config.store_mooncake or "",
        "--store-mooncake-segment-bytes": str("" if segment_bytes is None else segment_bytes),
    }
    return {flag: value for flag, value in flags.items() if value}


def _check_store(config: ServerConfig, choice: Choice | None = None) -> None:
    """Raises EngineStartError where flags of the store can have no effect."""
    flags = _store_flags(config)
    if flags and config.sidecar != "auto":
        flag = next(iter(flags))
        remedy = "give --sidecar auto" if config.sidecar == "none" else f"give it to the pd-sidecar at {config.sidecar}"
        raise EngineStartError(f"{flag} is for --sidecar auto", remedy)
    if flags and choice is not None and (choice.stages or choice.place.device != "cpu"):
        raise EngineStartError(
            f"{next(iter(flags))}: the prefix store takes blocks of KV in host memory, and with --kv-memory "
            f"{choice.provider.name} the sidecar does not reach them",
            "give --kv-memory shm, or no --store-... flags",
        )
    if "--store-dir-bytes" in flags and "--store-dir" not in flags:
        raise EngineStartError("--store-dir-bytes is the size of --store-dir", "give that too, or neither")
    if "--store-mooncake-segment-bytes" in flags and "--store-mooncake" not in flags:
        raise EngineStartError("--store-mooncake-segment-bytes is for --store-mooncake", "give that too, or neither")


def _command(config: ServerConfig) -> SidecarCommand:
    return SidecarCommand(
        engine_id=config.engine_id or f"engine-{uuid.uuid4().hex[:12]}",
        listen=config.sidecar_listen,
        transport=config.sidecar_transport,
        metrics_port=config.sidecar_metrics_port,
        log_level=config.log_level,
        more=tuple(word for flag_and_value in _store_flags(config).items() for word in flag_and_value),
    )


def _start(own: OwnSidecar | SidecarThread) -> str:
    try:
        own.start()
    except SidecarStartError as error:
        raise EngineStartError(str(error), "see --sidecar-listen, --sidecar-transport and --store-...") from error
    return own.socket_path


def _connect(
    config: ServerConfig,
    memory: KvMemory,
    socket_path: str,
    wake: Callable[[], None],
    observe_load: Callable[[LoadResult], None],
) -> SidecarKvTransfer:
    provider = memory.choice.provider
    transfer = SidecarKvTransfer(
        socket_path,
        lambda client: provider.enter(client, memory.pool, memory.layout),
        memory.layout,
        lease_s=config.kv_lease_s,
        pull_timeout_s=config.kv_pull_timeout_s,
        wake=wake,
        store_load_timeout_s=config.store_load_timeout_s,
        observe_load=observe_load,
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

"""Which tiers there are, fastest first: one line each in `open_store`."""

from __future__ import annotations

from pathlib import Path

from sidecar.config import SidecarConfig
from sidecar.errors import StartError, UsageError
from sidecar.store.block_store import BlockStore
from sidecar.store.contract import Tier
from sidecar.store.memory import MemoryTier
from sidecar.store.metrics import StoreMetrics
from sidecar.store.mooncake import MooncakeSettings, MooncakeTier
from sidecar.store.posix import PosixTier
from sidecar.transport import mooncake

DEFAULT_DIR_BYTES = 16 << 30
DEFAULT_SEGMENT_BYTES = 256 << 20


def open_store(config: SidecarConfig, metrics: StoreMetrics, host: str) -> BlockStore | None:
    """The store that the flags describe, None where they name no tier. Raises UsageError, StartError."""
    _check(config)
    tiers: list[Tier] = []
    if config.store_memory_bytes:
        tiers.append(MemoryTier(config.store_memory_bytes, metrics))
    if config.store_dir:
        tiers.append(PosixTier(Path(config.store_dir), config.store_dir_bytes or DEFAULT_DIR_BYTES, metrics))
    if config.store_mooncake:
        tiers.append(MooncakeTier(_mooncake_settings(config, host), metrics))
    if not tiers:
        return None
    return BlockStore(tiers, metrics, num_threads=config.store_threads, queue_bytes=config.store_queue_bytes)


def _mooncake_settings(config: SidecarConfig, host: str) -> MooncakeSettings:
    segment_bytes = config.store_mooncake_segment_bytes
    return MooncakeSettings(
        host,
        config.store_mooncake,
        DEFAULT_SEGMENT_BYTES if segment_bytes is None else int(segment_bytes),
        config.mooncake_protocol,
        config.mooncake_device,
    )


def _check(config: SidecarConfig) -> None:
    """What can't be, with the remedy."""
    if config.store_dir_bytes and not config.store_dir:
        raise UsageError("--store-dir-bytes is the size of --store-dir: give that too, or neither")
    if config.store_dir and not Path(config.store_dir).is_absolute():
        raise UsageError(f"--store-dir {config.store_dir}: give an absolute path, the same on every machine or not")
    if config.store_mooncake_segment_bytes is not None and not config.store_mooncake:
        raise UsageError("--store-mooncake-segment-bytes is for --store-mooncake HOST:PORT: give that too, or neither")
    if not config.store_mooncake:
        return
    host, _, port = config.store_mooncake.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--store-mooncake {config.store_mooncake}: give the master as HOST:PORT, for example 127.0.0.1:50051"
        )
    if message := mooncake.missing():
        raise StartError(f"--store-mooncake: {message}")

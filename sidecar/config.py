"""What a sidecar can be told, declared once; `cli` makes its flags from this."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from sidecar.errors import UsageError


class SidecarConfig(BaseModel):
    """Every setting with its bounds. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: str = Field(description="unix socket for the engine; a stale file is replaced, a live one refused")
    listen: str = Field(default="127.0.0.1:0", description="HOST:PORT where the sidecars of other engines connect")
    advertise_host: str = Field(default="", description="host that other engines are told (default: that of --listen)")
    engine_id: str = Field(min_length=1, max_length=1024, description="name of the engine beside this sidecar")
    rank: int = Field(default=0, ge=0, le=65535, description="rank of the engine's worker")
    transport: Literal["auto", "shm", "tcp", "mooncake"] = Field(
        default="auto",
        description="auto: shm on one host; between hosts mooncake with rdma or ascend, else tcp; or only the one",
    )
    metrics_port: int = Field(default=0, ge=0, le=65535, description="port of /metrics and /healthz; 0 takes any")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="least level logged")
    exit_on_stdin_eof: bool = Field(default=False, description="stop when standard input ends (parent has died)")
    remove_directory: bool = Field(
        default=False, description="remove the socket's directory in the end, if it is empty"
    )

    mooncake_protocol: Literal["tcp", "rdma", "ascend"] = Field(
        default="tcp", description="protocol of Mooncake's transfer engine"
    )
    mooncake_device: str = Field(default="", description="device names for Mooncake (rdma: comma-separated NICs)")

    store_memory_bytes: ByteSize = Field(
        default=ByteSize(0), ge=0, description="prefix store: host memory for finished blocks (4GiB); 0: none"
    )
    store_dir: str = Field(
        default="", description="prefix store: directory for finished blocks, which machines may share; empty: none"
    )
    store_dir_bytes: ByteSize = Field(
        default=ByteSize(0), ge=0, description="what --store-dir may hold, of every model and machine; 0: 16GiB"
    )
    store_mooncake: str = Field(default="", description="prefix store: HOST:PORT of a mooncake_master; empty: none")
    store_mooncake_segment_bytes: ByteSize | None = Field(
        default=None, ge=0, description="host memory given to Mooncake Store, 0 to only use that of others (256MiB)"
    )
    store_threads: int = Field(default=4, ge=1, le=64, description="threads reading from each tier of the store")
    store_queue_bytes: ByteSize = Field(
        default=ByteSize(512 << 20), ge=1 << 20, description="blocks on their way into the store; more are not kept"
    )

    claim_ttl_s: float = Field(
        default=5.0, ge=0.1, le=600, description="a claimed lease lives this long after its last heartbeat"
    )
    max_claim_s: float = Field(default=120.0, ge=1, le=3600, description="longest claim, whatever its heartbeats say")
    max_leases: int = Field(default=100_000, ge=1, le=10_000_000, description="leases that may be out at once")
    max_pulls: int = Field(default=4096, ge=1, le=1_000_000, description="pulls that may be open at once")
    max_peers: int = Field(default=1024, ge=1, le=65536, description="connections to and from peers, each way")
    connect_timeout_s: float = Field(default=3.0, ge=0.1, le=60, description="reaching a peer, handshake included")
    open_timeout_s: float = Field(
        default=15.0, ge=0.1, le=300, description="mapping a peer's pool, or starting Mooncake for it on both ends"
    )
    answer_timeout_s: float = Field(default=5.0, ge=0.1, le=60, description="a peer's answer to one control message")
    stall_timeout_s: float = Field(
        default=10.0, ge=0.1, le=600, description="a tcp data connection that moves nothing in a transfer is given up"
    )
    stop_grace_s: float = Field(default=1.0, ge=0.1, le=30, description="a copy may take this to stop, then it is cut")
    peer_idle_s: float = Field(default=300.0, ge=1, le=86400, description="an unused peer connection is closed after")
    peer_gone_s: float = Field(
        default=30.0, ge=3, le=3600, description="a peer whose host answers nothing any more is given up after"
    )
    copy_threads: int = Field(
        default_factory=lambda: max(1, min(4, os.cpu_count() or 1)), ge=1, le=64, description="threads copying over shm"
    )
    copy_bytes_per_s: int = Field(
        default=0, ge=0, le=1 << 50, description="cap on all copying, to leave bandwidth to the engine; 0: none"
    )

    @property
    def heartbeat_s(self) -> float:
        """A lease survives two heartbeats lost."""
        return self.claim_ttl_s / 3


def split_address(listen: str) -> tuple[str, int]:
    """(host, port) of --listen. Raises UsageError."""
    host, separator, port = listen.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen {listen}: give it as HOST:PORT, for example 127.0.0.1:9000 or 0.0.0.0:0")
    return host.strip("[]"), int(port)

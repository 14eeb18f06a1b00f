"""What the HTTP server is told at start. The engine core's own settings are EngineConfig's."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Role = Literal["prefill", "decode", "both"]
MIB = 1024 * 1024


class ServerConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    served_model_name: str | None = Field(None, min_length=1)
    """The name clients use; default: the model directory as given."""
    role: Role = "both"
    """Said in logs and by /server_info: every role answers every request, as in vLLM."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. Not for clients: they go through the proxy."""
    port: int = Field(8100, ge=0, le=65535)
    """Port to listen on; 0: any, said in the ready line."""
    sidecar: str = Field("none", min_length=1)
    """The sidecar's socket; auto: start one and keep it alive; none: no KV hand-off."""
    sidecar_listen: str = "127.0.0.1:0"
    """For --sidecar auto: where its peers reach it."""
    sidecar_transport: Literal["auto", "shm", "tcp", "mooncake"] = "auto"
    """For --sidecar auto: how KV travels."""
    sidecar_metrics_port: int = Field(0, ge=0, le=65535)
    """For --sidecar auto: its port for /metrics; 0: any."""
    store_memory_bytes: int = Field(0, ge=0)
    """For --sidecar auto: host memory for finished blocks of all prompts (prefix store); 0: none."""
    store_dir: str | None = Field(None, min_length=1)
    """For --sidecar auto: directory for finished blocks, which machines may share; default: none."""
    store_dir_bytes: int = Field(0, ge=0)
    """What --store-dir may hold, of every model and machine; 0: 16GiB."""
    store_mooncake: str | None = Field(None, min_length=1)
    """For --sidecar auto: HOST:PORT of a mooncake_master that keeps finished blocks; default: none."""
    store_mooncake_segment_bytes: int | None = Field(None, ge=0)
    """Host memory given to Mooncake Store, 0 to only use that of others; default: 256MiB."""
    store_load_timeout_s: float = Field(5.0, gt=0, le=600)
    """How long a prompt may wait for blocks out of the store before it is computed, in seconds."""
    kv_memory: Literal["auto", "shm", "staging", "in_process", "device_ipc"] = "auto"
    """How the sidecar gets at the KV: shm shares it, staging copies it through a buffer in host memory, in_process has
    the sidecar as a thread of the engine, device_ipc opens the device's memory; auto: the first that works here."""
    kv_staging_bytes: int = Field(256 * MIB, ge=1)
    """For --kv-memory staging, and for KV on a device with in_process: size of the buffer."""
    engine_id: str | None = Field(None, min_length=1, max_length=200)
    """This engine's name to its peers; default: a random one."""
    kv_lease_s: float = Field(30.0, gt=0, le=3600)
    """How long KV offered to a decoder is kept for it, in seconds."""
    kv_pull_timeout_s: float = Field(30.0, gt=0, le=3600)
    """How long a pull of KV may take, in seconds."""
    kv_push_timeout_s: float = Field(120.0, gt=0, le=3600)
    """How long a decoder's blocks wait for KV that is pushed layer by layer, the prefill included, in seconds."""
    max_body_bytes: int = Field(64 * MIB, ge=1024)
    """Largest request body."""
    limit_mm_per_prompt: str = "image=16"
    """Images a request may hold, as image=N; 0: none."""
    max_media_bytes: int = Field(32 * MIB, ge=1024)
    """All image files of a request together, as they were encoded."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Width times height of one image, before it is scaled to the model's size."""
    media_fetch_timeout_s: float = Field(5.0, gt=0, le=600)
    """How long one image's URL may take, redirects included, in seconds."""
    allowed_media_domains: tuple[str, ...] = ()
    """The only hosts that image URLs may name, separated by spaces; default: any."""
    allow_private_media: bool = False
    """Also fetch images from private, loopback and link-local addresses."""
    drain_timeout_s: float = Field(30.0, ge=0, le=3600)
    """On SIGTERM or SIGINT: how long running requests and offered KV may still take, in seconds."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""

    @field_validator("limit_mm_per_prompt")
    @classmethod
    def _as_words(cls, value: str) -> str:
        """vLLM's other form, {"image": N}, becomes image=N."""
        found = re.fullmatch(r'\s*(?:image=(\d{1,4})|\{\s*"image"\s*:\s*(\d{1,4})\s*\})\s*', value)
        if found is None:
            raise ValueError('write image=N, or {"image": N}')
        return f"image={found[1] or found[2]}"

    @property
    def max_images(self) -> int:
        """Of one request."""
        return int(self.limit_mm_per_prompt.partition("=")[2])

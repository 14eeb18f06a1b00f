"""What the engine core is told at start. Bounds and defaults stand here once; the command's flags come from them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Dtype = Literal["auto", "float32", "bfloat16"]
DeviceKind = Literal["cpu", "cuda", "npu"]
KvLoadFailurePolicy = Literal["fail", "recompute"]


class EngineStartError(Exception):
    """The engine can't start. `message` says what is wrong, `remedy` what to do; both fit in one line for a user."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}: {remedy}")
        self.message = message
        self.remedy = remedy


class EngineConfig(BaseModel):
    """The engine core's settings; the HTTP server's own ones are declared by the server."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    model: Path
    """A Hugging Face directory: config.json, *.safetensors, tokenizer."""
    device: DeviceKind = "cpu"
    dtype: Dtype = "auto"
    max_model_len: PositiveInt | None = None
    """Prompt plus generated tokens of one request; None: the model's max_position_embeddings."""
    block_size: int = Field(16, ge=1, le=256)
    """Tokens a KV block."""
    num_blocks: PositiveInt | None = None
    """Blocks in the pool; None: as many as `kv_pool_bytes` holds."""
    kv_pool_bytes: PositiveInt = 256 * 1024 * 1024
    """Ignored where `num_blocks` is given."""
    max_num_seqs: int = Field(64, ge=1, le=4096)
    """Requests that run in one step."""
    max_num_batched_tokens: int = Field(2048, ge=1)
    """Token budget of one step: prompt tokens are chunked to it."""
    enable_prefix_caching: bool = True
    seed: int = 0
    """For requests that bring no seed of their own."""
    num_threads: PositiveInt | None = None
    """Threads of torch; None: the cores this process may use."""
    kv_load_failure_policy: KvLoadFailurePolicy = "fail"
    """A prompt whose KV could not be pulled: fail it with 503, or prefill it here."""

"""Everything that differs between vLLM 0.11 and 0.32, and every name we take from it (kv-contracts section 1.9)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from engine_adapter.model_fingerprint import model_fingerprint

__all__ = ["KVConnectorBase_V1", "KVConnectorMetadata", "KVConnectorRole"]


def _version() -> tuple[int, ...]:
    """Of the CPU wheel too, whose distribution has another name than the package."""
    text = str(getattr(vllm, "__version__", ""))
    if not text[:1].isdigit() or text.startswith("0.1.dev"):
        text = importlib.metadata.version("vllm")
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


VERSION = _version()
VERSION_TEXT = ".".join(map(str, VERSION))

SupportsHMA: type = getattr(base, "SupportsHMA", object)
"""From 0.13: a connector that is given block ids a KV cache group."""
TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)
"""From about 0.32: failed loads are reported by request id, in one object with the rest."""
REPORTS_LOAD_ERRORS = hasattr(KVConnectorBase_V1, "get_block_ids_with_load_errors")
"""From 0.13. Before, vLLM takes every finished load for a good one: a failed one must end the engine instead."""
ABORTED_LOAD_KEEPS_ITS_BLOCKS = VERSION >= (0, 18)
"""vLLM 0.18 and later keep the blocks of an aborted load until it is reported as received; 0.11 and 0.13 free them at
once unless request_finished says that something is being sent. 0.14 to 0.17 were not read: see `aborted_as_sent`."""

_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


def init_base(connector: Any, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
    """The base class's constructor takes the KV cache config from 0.13 on."""
    if VERSION >= (0, 13):
        KVConnectorBase_V1.__init__(connector, vllm_config, role, kv_cache_config)
    else:
        KVConnectorBase_V1.__init__(connector, vllm_config, role)


def tensor_parallel_rank() -> int:
    """Of this worker, within its tensor-parallel group."""
    return int(get_tensor_model_parallel_rank())


def model_name(vllm_config: Any) -> str:
    """A fingerprint of the weights where they lie in a directory, else of the name and config."""
    model = vllm_config.model_config
    path = Path(str(model.model))
    if path.is_dir():
        return model_fingerprint(path)
    config = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{model.model}|{model.revision}|{config}".encode()).hexdigest()


def kernel_order(vllm_config: Any, dtype: Any, head_size: int, block_size: int) -> str:
    """Names the order of a block's bytes: vLLM's CPU kernel packs keys as its instruction set likes them."""
    try:
        isa = _cpu_isa(dtype, head_size, block_size)
    except (ImportError, AttributeError, TypeError):
        isa = "unknown"
    return f"vllm-{VERSION_TEXT},{isa},{vllm_config.cache_config.cache_dtype}"


def _cpu_isa(dtype: Any, head_size: int, block_size: int) -> str:
    cpu_attn: Any = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    takes = len(inspect.signature(cpu_attn._get_attn_isa).parameters)
    return str(cpu_attn._get_attn_isa(*(dtype, block_size, head_size)[:takes]))


def total_kv_heads(model_config: Any) -> int:
    """KV heads of the whole model; every rank holds MLA's one latent."""
    return 1 if getattr(model_config, "use_mla", False) else int(model_config.get_total_num_kv_heads())


def external_id(request: Any) -> str:
    """A request's id as the API server names it, from which a proxy knows it: 0.14 and later add eight hex digits."""
    request_id = str(request.request_id)
    plain = os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0").strip() not in ("", "0")
    return request_id if VERSION < (0, 14) or plain else _SUFFIX.sub("", request_id)


def hooks_are_whole(vllm_config: Any) -> bool:
    """Whether all of a layer is written when save_kv_layer is called: not where a step is cut in micro-batches, nor
    where a draft model's layers run more than once."""
    parallel = vllm_config.parallel_config
    cut = getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)
    return not cut and getattr(vllm_config, "speculative_config", None) is None


def finished_well(request: Any) -> bool:
    """True where a request ended by length or stop, not by abort or error."""
    return request.status.name in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")


def block_size(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens in a block, of the first KV cache group where the config says it (0.13 and later)."""
    groups = getattr(kv_cache_config, "kv_cache_groups", None)
    return int(groups[0].kv_cache_spec.block_size if groups else vllm_config.cache_config.block_size)


def num_blocks(vllm_config: Any, kv_cache_config: Any) -> int:
    """Blocks in the pool."""
    return int(getattr(kv_cache_config, "num_blocks", None) or vllm_config.cache_config.num_gpu_blocks)


_NO_KV_IN_THEM = ("_name_or_path", "transformers_version", "torch_dtype", "use_cache", "architectures")
_WINDOWED = ("SlidingWindow", "ChunkedLocal", "Mamba", "CircularBuffer", "Cross", "EncoderOnly", "RSWA")


def computation(vllm_config: Any) -> str:
    """Names what, beside the weights and the layout, decides over a block's values: the config in use, not the file's
    (--hf-overrides), and how the weights were made."""
    model = vllm_config.model_config
    config = {key: value for key, value in model.hf_config.to_dict().items() if key not in _NO_KV_IN_THEM}
    loads = str(getattr(getattr(vllm_config, "load_config", None), "load_format", ""))
    made = [
        VERSION_TEXT, config, str(model.dtype), str(getattr(model, "quantization", None)),
        [loads, getattr(model, "seed", None)] if "dummy" in loads.lower() else [],
        bool(getattr(vllm_config.cache_config, "calculate_kv_scales", False)), model_name(vllm_config),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()


def store_fault(vllm_config: Any, kv_cache_config: Any) -> str:
    """Why there can be no prefix store, and what to do; "" if there can."""
    policy = getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", "recompute")
    if not REPORTS_LOAD_ERRORS:
        return f"vLLM {VERSION_TEXT} can't compute what a store did not give: take 0.13 or later, or no prefix store"
    if policy != "recompute":
        return (
            f'kv_load_failure_policy is "{policy}", with which a prefix store that loses a block fails the request: '
            'put "kv_load_failure_policy": "recompute" beside kv_role (of MultiConnector and of its child)'
        )
    parallel = vllm_config.parallel_config
    for key in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, key, 1) > 1:
            return f"the prefix store knows no {key} above 1: leave that flag or kv_connector_extra_config.store out"
    groups = getattr(kv_cache_config, "kv_cache_groups", None) or ()
    for spec in (type(group.kv_cache_spec).__name__ for group in groups):
        if spec.startswith(_WINDOWED):
            return f"this model's KV cache is {spec}, whose blocks end early: leave kv_connector_extra_config.store out"
    return ""


def show_log_lines(level: str) -> None:
    """vLLM gives handlers to its own loggers only: ours borrow them, unless somebody has set them up."""
    ours, theirs = logging.getLogger("engine_adapter"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = not ours.handlers
    ours.setLevel(level)

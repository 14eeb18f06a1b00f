"""From a Hugging Face directory to a model that runs on the paged pool. Everything about weights is transformers'."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from engine_adapter.device import Device
from engine_adapter.model_fingerprint import model_fingerprint
from engine_adapter.torch_engine.attention import ATTENTION_NAME, register_attention
from engine_adapter.torch_engine.batch_invariant import ForwardKind
from engine_adapter.torch_engine.config import Dtype, EngineStartError
from engine_adapter.torch_engine.invariant_model import make_batch_invariant
from engine_adapter.torch_engine.model_shape import ModelShape
from engine_adapter.torch_engine.vision_tower import VisionTower

SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_moe")
"""`model_type`s whose modules have been tested on the paged attention. To add one: its name here, and a test."""

_NEED_TRANSFORMERS_5 = ("qwen2_5_vl", "qwen3_moe")
"""Their modules were made anew there; the older ones don't fit what this engine puts in their place."""
_FULL_ATTENTION = "full_attention"


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run. `kind` is to be set before each forward; decodes have a multiple of so many rows."""

    backbone: nn.Module
    lm_head: nn.Module
    shape: ModelShape
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: frozenset[int]
    fingerprint: str
    kind: ForwardKind
    decode_multiple: int
    vision: VisionTower | None = None
    image_token_id: int | None = None


def load_model(model_dir: Path, dtype: Dtype, device: Device, max_positions: int | None = None) -> LoadedModel:
    """Raises EngineStartError for a directory that holds no model this engine can run.

    `max_positions` bounds the table of rotary embeddings; None: what the config allows.
    """
    config = _read_config(model_dir)
    torch_dtype = _choose_dtype(config, dtype, device)
    register_attention()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    sees = hasattr(config, "vision_config")
    kind_of_model: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    attention: Any = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"} if sees else ATTENTION_NAME
    try:
        model: Any = kind_of_model.from_pretrained(
            model_dir, config=config, dtype=torch_dtype, attn_implementation=attention, local_files_only=True
        )
        fingerprint = model_fingerprint(model_dir)
    except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
        raise EngineStartError(
            f"can't load the weights in {model_dir} ({_first_line(exc)})", "check that the download is complete"
        ) from exc
    model.eval().requires_grad_(False)
    model.to(device.torch_device)
    text_config = config.get_text_config()
    max_position_embeddings = int(text_config.max_position_embeddings)
    kind, decode_multiple = make_batch_invariant(
        model, max_positions=min(max_positions or max_position_embeddings, max_position_embeddings), device=device
    )
    return LoadedModel(
        backbone=model.get_decoder(),
        lm_head=model.get_output_embeddings(),
        shape=_shape_of(text_config, torch_dtype),
        vocab_size=int(text_config.vocab_size),
        max_position_embeddings=max_position_embeddings,
        eos_token_ids=read_eos_token_ids(model_dir),
        fingerprint=fingerprint,
        kind=kind,
        decode_multiple=decode_multiple,
        vision=VisionTower(model.model.visual, device.torch_device) if sees else None,
        image_token_id=int(config.image_token_id) if sees else None,
    )


def _read_config(model_dir: Path) -> Any:
    if not (model_dir / "config.json").is_file():
        raise EngineStartError(
            f"{model_dir} is not a model directory (it has no config.json)",
            "give a Hugging Face directory, or make one with pd-engine make-model DIR --family qwen3 --size tiny",
        )
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as exc:
        raise EngineStartError(f"can't read {model_dir}/config.json ({_first_line(exc)})", "repair the file") from exc
    if config.model_type not in SUPPORTED_FAMILIES:
        raise EngineStartError(
            f"{model_dir} is a {config.model_type!r} model", f"this engine runs {', '.join(SUPPORTED_FAMILIES)}"
        )
    if config.model_type in _NEED_TRANSFORMERS_5 and int(transformers_version.partition(".")[0]) < 5:
        raise EngineStartError(
            f"{config.model_type} models need transformers 5, this is {transformers_version}",
            "pip install 'transformers>=5'",
        )
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or [_FULL_ATTENTION])
    if layer_types != {_FULL_ATTENTION}:
        raise EngineStartError(
            f"{model_dir} has layers with {', '.join(sorted(layer_types - {_FULL_ATTENTION}))}",
            "this engine runs full attention only; set use_sliding_window to false if the model allows it",
        )
    if not list(model_dir.glob("*.safetensors")):
        raise EngineStartError(f"{model_dir} holds no *.safetensors file", "download the weights as safetensors")
    return config


def _choose_dtype(config: Any, dtype: Dtype, device: Device) -> torch.dtype:
    """`auto` takes the config's dtype where the device computes with it (float16 does not on CPU)."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    declared = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return declared if declared in (torch.float32, torch.bfloat16) else device.default_dtype


def _shape_of(config: Any, dtype: torch.dtype) -> ModelShape:
    num_heads = int(config.num_attention_heads)
    return ModelShape(
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        dtype=dtype,
    )


def read_eos_token_ids(model_dir: Path) -> frozenset[int]:
    """The ids that end a text: generation_config.json's, else config.json's, and the tokenizer's own."""
    token_ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(model_dir / name).get("eos_token_id")
        if value is not None:
            token_ids.update(value if isinstance(value, list) else [value])
            break
    tokenizer_eos_id = _tokenizer_eos_id(model_dir)
    if tokenizer_eos_id is not None:
        token_ids.add(tokenizer_eos_id)
    return frozenset(token_ids)


def _tokenizer_eos_id(model_dir: Path) -> int | None:
    tokenizer_config = _read_json(model_dir / "tokenizer_config.json")
    eos_token = tokenizer_config.get("eos_token")
    content = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    for token in _read_json(model_dir / "tokenizer.json").get("added_tokens", []):
        if token.get("content") == content:
            return int(token["id"])
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _first_line(exc: Exception) -> str:
    return str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__

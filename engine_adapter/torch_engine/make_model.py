"""A model to run with no network: random weights of a real architecture, a real tokenizer, and a chat template.

It says nothing sensible, but what it says depends on every token before, varies from token to token, and is the same
for the same family, size and seed: what tests and demonstrations of a serving system need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging as transformers_logging

from engine_adapter.torch_engine.training_text import training_text

Family = Literal["qwen3", "qwen2", "llama", "qwen3_moe", "qwen2_5_vl"]
Size = Literal["tiny", "small"]

TEXT_FAMILIES: dict[Family, Callable[..., PretrainedConfig]] = {
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "qwen3_moe": Qwen3MoeConfig,
}

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
VISION_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_WEIGHT_GAIN = 1.5
"""Standard deviation of a weight times sqrt(inputs). Measured: from 1.0 on, 48 greedy tokens hold 40 distinct ones."""


@dataclass(frozen=True, slots=True)
class _Dimensions:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


SIZES: dict[Size, _Dimensions] = {
    "tiny": _Dimensions(4, 128, 384, 4, 2, 32, 1024),
    "small": _Dimensions(8, 512, 1536, 8, 4, 64, 4096),
}
_MAX_POSITIONS = 4096
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "merge_size": 2,
    "patch_size": 14,
    "resample": 3,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256},
    "temporal_patch_size": 2,
}
"""preprocessor_config.json: at most 256 tokens an image."""


def make_model(directory: Path, family: Family, size: Size, seed: int = 0) -> None:
    """Write a Hugging Face directory: config, safetensors, tokenizer, chat template, generation config.

    Deterministic in (family, size, seed) for one version of torch. Raises OSError where the directory can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    sees = family == "qwen2_5_vl"
    tokenizer = _train_tokenizer(SIZES[size].vocab_size, VISION_TOKENS if sees else ())
    tokenizer.save_pretrained(directory)
    stop_ids: Any = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    if sees:
        config = _make_vision_config(SIZES[size], tokenizer, stop_ids)
        (directory / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n")
    else:
        config = _make_config(family, SIZES[size], len(tokenizer), stop_ids)
    model = _make_weights(config, seed)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=None, eos_token_id=stop_ids, pad_token_id=stop_ids[1], do_sample=False
    )
    model.save_pretrained(directory)


def _train_tokenizer(vocab_size: int, more_special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, *more_special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line + "\n" for line in training_text()), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, *more_special],
        chat_template=VISION_CHAT_TEMPLATE if more_special else CHAT_TEMPLATE,
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _make_config(family: Family, size: _Dimensions, vocab_size: int, stop_ids: list[int]) -> PretrainedConfig:
    return TEXT_FAMILIES[family](
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=stop_ids[0],
        pad_token_id=stop_ids[1],
        **(_EXPERTS if family == "qwen3_moe" else {}),
    )


def _make_vision_config(size: _Dimensions, tokenizer: Any, stop_ids: list[int]) -> PretrainedConfig:
    """The text model of the size, seen to by a vision tower half as wide; the head's channels go to three positions."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "max_position_embeddings": _MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": stop_ids[0],
        "pad_token_id": stop_ids[1],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [size.head_dim // 8, size.head_dim * 3 // 16, size.head_dim * 3 // 16],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": size.hidden_size // 2,
        "intermediate_size": size.hidden_size,
        "num_heads": 4,
        "out_hidden_size": size.hidden_size,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )


def _make_weights(config: PretrainedConfig, seed: int) -> Any:
    """Weights wide enough that attention and token both matter; the library's own narrow init repeats one token."""
    with torch.random.fork_rng(devices=[]):
        kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model: Any = kind.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, _WEIGHT_GAIN / math.sqrt(module.in_features), generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1, generator=generator)
            elif isinstance(module, nn.Conv3d):  # the vision tower's patches
                module.weight.normal_(0, _WEIGHT_GAIN / math.sqrt(module.weight[0].numel()), generator=generator)
            else:  # stacked experts and their router
                for weight in module.parameters(recurse=False):
                    if weight.ndim > 1:
                        weight.normal_(0, _WEIGHT_GAIN / math.sqrt(weight.shape[-1]), generator=generator)
    return model

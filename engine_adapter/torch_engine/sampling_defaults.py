"""What a model asks for where a request doesn't say: its generation_config.json, which vLLM honours by default."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    """Bounds what any request may generate."""


def read_sampling_defaults(model_dir: Path) -> SamplingDefaults:
    """A missing or unreadable file, and values of the wrong type, ask for nothing."""
    try:
        fields = json.loads((model_dir / "generation_config.json").read_text())
    except (OSError, ValueError):
        return SamplingDefaults()
    if not isinstance(fields, dict):
        return SamplingDefaults()
    floats = ("temperature", "top_p", "min_p", "repetition_penalty")
    known: dict[str, float] = {
        name: float(fields[name]) for name in floats if isinstance(fields.get(name), int | float)
    }
    ints = {
        name: fields[name]
        for name in ("top_k", "max_new_tokens")
        if isinstance(fields.get(name), int) and not isinstance(fields[name], bool)
    }
    return SamplingDefaults(
        temperature=known.get("temperature", 1.0),
        top_p=known.get("top_p", 1.0),
        min_p=known.get("min_p", 0.0),
        repetition_penalty=known.get("repetition_penalty", 1.0),
        top_k=ints.get("top_k", 0),
        max_new_tokens=ints.get("max_new_tokens"),
    )

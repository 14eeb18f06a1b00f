"""What an engine has done since it began."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Tokens since the start; they only grow. Prompt tokens are counted once a request, with its first token."""

    num_prompt_tokens_local_compute: int = 0
    num_prompt_tokens_local_cache_hit: int = 0
    num_prompt_tokens_external_kv_transfer: int = 0
    num_generation_tokens: int = 0

"""Names a model by what it computes, so that KV is only ever exchanged between engines that run the same one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

_SAMPLE_BYTES = 64 * 1024
_IRRELEVANT_KEYS = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "architectures",
        "_attn_implementation",
    }
)
"""Config keys that change nothing in the KV; the dtype in use is compared on its own."""


def model_fingerprint(model_dir: Path) -> str:
    """Sha256 over the normalised config and, per safetensors file in name order, its size, first and last 64 KiB.

    A sample of the weights, not all of them: a start must not read tens of gigabytes twice. The header of a
    safetensors file (names, shapes, offsets) is in the first bytes. Raises OSError, ValueError (config.json).
    """
    digest = hashlib.sha256()
    config = json.loads((model_dir / "config.json").read_text())
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT_KEYS}
    digest.update(json.dumps(relevant, sort_keys=True, separators=(",", ":")).encode())
    for path in sorted(model_dir.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"|{path.name}|{num_bytes}|".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(-min(_SAMPLE_BYTES, num_bytes), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()

"""`pd-engine make-model`: says what it does, and never writes over somebody's files."""

from __future__ import annotations

import time
from pathlib import Path

from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.make_model import Family, Size, make_model


def make_model_directory(directory: Path, family: Family, size: Size, seed: int) -> int:
    """Raises EngineStartError where the directory holds anything, or can't be written."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise EngineStartError(f"{directory} is there already and not an empty directory", "name another one")
    print(f"making a {size} {family} model with seed {seed} in {directory} ...", flush=True)
    began = time.monotonic()
    try:
        make_model(directory, family, size, seed)
    except OSError as error:
        raise EngineStartError(f"{directory} can't be written ({error})", "name a directory you may write") from error
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"made {directory} ({num_bytes / 1e6:.1f} MB) in {time.monotonic() - began:.1f} s", flush=True)
    return 0

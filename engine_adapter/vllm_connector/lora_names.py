"""Names a LoRA adapter by its content, as far as that can be trusted to be what the engine has loaded."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 1 << 20

Stamp = tuple[tuple[str, int, int], ...]


class LoraNames:
    """Adapters seen so far. An adapter whose files change afterwards has no name any more: which ones are loaded is
    not known."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], tuple[Stamp, tuple[str, ...]]] = {}
        self._warned: set[tuple[int, str]] = set()

    def of(self, lora_request: Any) -> tuple[str, ...] | None:
        """() without an adapter, None where its blocks can't be shared."""
        if lora_request is None:
            return ()
        path = Path(str(lora_request.lora_path))
        key = (int(lora_request.lora_int_id), str(path))
        try:
            stamp = _stamp(path)
            known = self._seen.get(key)
            if known is None:
                known = self._seen[key] = (stamp, (str(lora_request.lora_name), _fingerprint(path, stamp)))
        except OSError as error:
            stamp, known, why = (), None, f"its files can't be read: {error.strerror}"
        else:
            why = "it is no local directory" if not stamp else "its files have changed" if known[0] != stamp else ""
        if getattr(lora_request, "load_inplace", False):
            why = why or "it is loaded in place"
        if known is not None and not why:
            return known[1]
        self._warn_once(key, why)
        return None

    def _warn_once(self, key: tuple[int, str], why: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("lora_not_stored path=%s reason=%s", key[1], why)


def _stamp(path: Path) -> Stamp:
    files = sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else []
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _fingerprint(path: Path, stamp: Stamp) -> str:
    digest = hashlib.sha256()
    for name, num_bytes, _ in stamp:
        digest.update(f"|{name}|{num_bytes}|".encode())
        with (path / name).open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, num_bytes - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

"""How much a store's directory holds, and making room in it: the files used longest ago go first.

Several processes, also on other machines, may share the directory and know nothing of each other: what they write is
seen at the next sweep, which is due after a 16th of the limit was written here. So n writers may exceed the limit by up
to n 16ths. No locks: who finds a file gone was only slower.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sidecar.store.contract import TierObserver

logger = logging.getLogger(__name__)

LOW_SHARE = 0.9
"""A sweep makes this much room, so that the next one is not due at once."""
SWEEP_SHARE = 1 / 16
STALE_TEMPORARY_S = 3600.0
"""A file that is still being written after this long was left by a writer that died."""
TEMPORARY = "tmp"


class DirectorySpace:
    """Thread-safe; `take` and `sweep` block on the file system."""

    def __init__(self, root: Path, max_bytes: int, observer: TierObserver, tier: str) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._observer = observer
        self._tier = tier
        self._lock = threading.Lock()
        self._num_blocks = 0
        self._num_bytes = 0
        self._since_sweep = 0
        self._swept = False

    def usage(self) -> tuple[int, int]:
        return self._num_blocks, self._num_bytes

    def take(self, num_bytes: int) -> bool:
        """Reserve room for a file, evicting others for it; False where that can't be. Raises OSError."""
        with self._lock:
            due = not self._swept or self._since_sweep > self._max_bytes * SWEEP_SHARE
            if due or self._num_bytes + num_bytes > self._max_bytes:
                self._sweep(num_bytes)
            if self._num_bytes + num_bytes > self._max_bytes:
                return False
            self._num_blocks += 1
            self._num_bytes += num_bytes
            self._since_sweep += num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        """A file was not written after all, or is gone."""
        with self._lock:
            self._num_blocks = max(0, self._num_blocks - 1)
            self._num_bytes = max(0, self._num_bytes - num_bytes)

    def _sweep(self, num_wanted_bytes: int) -> None:
        started_at = time.monotonic()
        self._remove_stale_temporaries()
        files = sorted(self._files())
        num_bytes = sum(size for _, size, _ in files)
        num_evicted = 0
        if num_bytes + num_wanted_bytes > self._max_bytes:
            room = min(self._max_bytes - num_wanted_bytes, int(self._max_bytes * LOW_SHARE))
            for _, size, path in files:
                if num_bytes <= room:
                    break
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    logger.warning("store_evict_failed path=%s error=%s", path, error.strerror)
                    continue
                num_bytes -= size
                num_evicted += 1
        self._num_blocks, self._num_bytes = len(files) - num_evicted, num_bytes
        self._since_sweep, self._swept = 0, True
        if num_evicted:
            self._observer.evicted(self._tier, num_evicted)
            took_s = time.monotonic() - started_at
            logger.info("store_evicted num=%d bytes=%d took_s=%.3f", num_evicted, num_bytes, took_s)

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(last use, bytes, path) of every block of every model."""
        for namespace in _directories(self._root):
            if namespace.name == TEMPORARY:
                continue
            for shelf in _directories(namespace.path):
                with contextlib.suppress(FileNotFoundError), os.scandir(shelf.path) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):
                            if entry.is_file(follow_symlinks=False):
                                status = entry.stat(follow_symlinks=False)
                                yield status.st_mtime, status.st_size, entry.path

    def _remove_stale_temporaries(self) -> None:
        """By the file system's own clock, which another machine's need not agree with."""
        directory = self._root / TEMPORARY
        with contextlib.suppress(OSError):
            os.utime(directory)
            now = directory.stat().st_mtime
            for entry in os.scandir(directory):
                with contextlib.suppress(OSError):
                    if now - entry.stat(follow_symlinks=False).st_mtime > STALE_TEMPORARY_S:
                        os.unlink(entry.path)


def _directories(path: Path | str) -> list[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []

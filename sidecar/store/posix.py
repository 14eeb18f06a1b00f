"""A directory as a tier, which machines may share (NFS, a parallel file system): one file a block, and no locks.

A file appears whole or not at all (written beside, synced, renamed) and is verified when it is read, so that neither a
crash nor another writer of the same block can show anybody a wrong byte.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from sidecar.errors import StartError
from sidecar.store.backoff import Backoff
from sidecar.store.contract import TierObserver
from sidecar.store.directory_space import TEMPORARY, DirectorySpace
from sidecar.store.keys import BlockKey
from sidecar.store.sealed_block import HEADER_BYTES, Bytes, fault, header_of

logger = logging.getLogger(__name__)

TOUCH_AFTER_S = 60.0
"""A read marks a file as used when the last mark is older: one more round trip a minute on NFS, not one a read."""
MAX_BAD_KEYS = 4096
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class PosixTier:
    """See contract.Tier."""

    name = "posix"
    is_memory = False

    def __init__(self, root: Path, max_bytes: int, observer: TierObserver) -> None:
        """Raises StartError where the directory can't be made or written."""
        self._root = root
        self._observer = observer
        self._temporary = root / TEMPORARY
        self._writes = Backoff()
        self._bad: OrderedDict[BlockKey, None] = OrderedDict()
        """Files that are no good and not ours to remove."""
        self._space = DirectorySpace(root, max_bytes, observer, self.name)
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            self._temporary.mkdir(mode=0o700, exist_ok=True)
            probe = self._temporary / f"probe-{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StartError(
                f"--store-dir {root}: {error.strerror}; give a directory that can be written, in one that exists"
            ) from error

    def path_of(self, key: BlockKey) -> Path:
        name = key.block_hash.hex()
        return self._root / key.namespace.hex() / name[:2] / name

    def has(self, keys: Sequence[BlockKey], *, until_missing: bool) -> list[bool]:
        found = []
        for key in keys:
            found.append(key not in self._bad and self._exists(key))
            if until_missing and not found[-1]:
                break
        return found + [False] * (len(keys) - len(found))

    def get(self, key: BlockKey, num_bytes: int) -> bytearray | None:
        path = self.path_of(key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed("read", path, error)
            return None
        try:
            status = os.fstat(fd)
            header, block = bytearray(HEADER_BYTES), bytearray(num_bytes)
            kind = "torn"
            if not stat.S_ISREG(status.st_mode):
                kind = "foreign"
            elif status.st_size == HEADER_BYTES + num_bytes and _read(fd, header, block):
                kind = fault(header, block, key)
            elif status.st_size >= HEADER_BYTES and _read(fd, header, bytearray()):
                kind = fault(header, b"", key) or "torn"
            if kind:
                self._remove_bad(key, path, kind, status)
                return None
        except OSError as error:
            self._failed("read", path, error)
            return None
        finally:
            os.close(fd)
        self._touch(path, status)
        return block

    def put(self, key: BlockKey, block: bytearray) -> bool:
        if self._writes.why:
            return False
        path = self.path_of(key)
        num_bytes = HEADER_BYTES + len(block)
        try:
            if self._exists(key) and key not in self._bad:
                return True
            if not self._space.take(num_bytes):
                self._observer.error(self.name, "full")
                self._writes.failed(f"{self._root} is full, and nothing in it can be removed")
                return False
            try:
                self._write(path, header_of(key, block), block)
            except BaseException:
                self._space.give_back(num_bytes)
                raise
        except OSError as error:
            self._failed("full" if error.errno in _FULL else "write", path, error)
            self._writes.failed(f"writing to {self._root} failed: {error.strerror}")
            return False
        self._bad.pop(key, None)
        self._writes.succeeded()
        return True

    def usage(self) -> tuple[int, int]:
        return self._space.usage()

    def fault(self) -> str:
        return self._writes.why

    def close(self) -> None:
        """Nothing is held open."""

    def _exists(self, key: BlockKey) -> bool:
        try:
            return stat.S_ISREG(os.lstat(self.path_of(key)).st_mode)
        except OSError:
            return False

    def _write(self, path: Path, header: bytes, block: Bytes) -> None:
        """Write beside, sync, rename, sync the directory. Two writers of one block rename the same content twice."""
        beside = self._temporary / f"{path.name}-{secrets.token_hex(8)}"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                _write_all(fd, header, block)
                os.fsync(fd)
            finally:
                os.close(fd)  # on NFS this may be where a full disk is told
            path.parent.parent.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        _sync_directory(path.parent)

    def _touch(self, path: Path, status: os.stat_result) -> None:
        """Mark as used, by the file system's clock. Access times would do, were they kept everywhere."""
        if abs(time.time() - status.st_mtime) > TOUCH_AFTER_S:
            with contextlib.suppress(OSError):
                os.utime(path)

    def _remove_bad(self, key: BlockKey, path: Path, kind: str, status: os.stat_result) -> None:
        self._observer.error(self.name, kind)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        logger.warning("store_bad_block tier=posix kind=%s path=%s action=%s", kind, path, "remove" if ours else "skip")
        if ours:
            with contextlib.suppress(OSError):
                if os.lstat(path).st_ino == status.st_ino:  # else somebody has written a good one meanwhile
                    os.unlink(path)  # the next sweep counts: a reader does not wait for one
            return
        self._bad[key] = None
        while len(self._bad) > MAX_BAD_KEYS:
            self._bad.popitem(last=False)

    def _failed(self, kind: str, path: Path, error: OSError) -> None:
        self._observer.error(self.name, kind)
        logger.warning("store_%s_failed tier=posix path=%s error=%s", kind, path, error.strerror)


def _read(fd: int, header: bytearray, block: bytearray) -> bool:
    """Fill both; False where the file ends before."""
    wanted = [memoryview(header), memoryview(block)]
    while wanted:
        num_read = os.readv(fd, wanted)
        if num_read == 0:
            return not any(wanted)
        wanted = _rest(wanted, num_read)
    return True


def _write_all(fd: int, header: bytes, block: Bytes) -> None:
    waiting = [memoryview(header), memoryview(block)]
    while waiting:
        waiting = _rest(waiting, os.writev(fd, waiting))


def _rest(views: list[memoryview], num_done: int) -> list[memoryview]:
    rest = []
    for view in views:
        skipped = min(num_done, len(view))
        num_done -= skipped
        if skipped < len(view):
            rest.append(view[skipped:])
    return rest


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

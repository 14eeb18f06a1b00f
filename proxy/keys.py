"""Keys that are accepted, from the configuration and from a file that is followed as it changes.

What is kept of a key is a digest under a secret of this process. What a client sends is compared by its digest, so how
long a comparison takes says nothing about any key.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from proxy.errors import ConfigError

log = logging.getLogger(__name__)

_SECRET = secrets.token_bytes(32)
DIGEST_BYTES = 16
MAX_KEY_BYTES = 1024


def digest_of(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=DIGEST_BYTES, key=_SECRET).digest()


def keys_in(text: str, where: str) -> list[bytes]:
    """One key a line; empty lines and what begins with # are none. Raises ConfigError, which does not show a key."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if key and not key.startswith("#"):
            found.append(_checked(key, f"{where}, line {number}"))
    return found


def _checked(key: str, where: str) -> bytes:
    if not key.isascii() or not key.isprintable() or " " in key or not 0 < len(key) <= MAX_KEY_BYTES:
        raise ConfigError(f"{where}: a key is printable ASCII without blanks, at most {MAX_KEY_BYTES} bytes")
    return key.encode()


class Keys:
    """The keys of one kind. `path` may be empty. Raises ConfigError where what is named cannot be used."""

    def __init__(self, given: Sequence[str], path: str, flag: str) -> None:
        self._flag = flag
        self._given = frozenset(digest_of(_checked(key, flag)) for key in given)
        self._read: frozenset[bytes] = frozenset()
        self._path = path
        self._seen: tuple[int, ...] = ()
        self.are_asked_for = bool(given or path)
        """Whether there are to be any: with an emptied file nobody is let in, not everybody."""
        if path:
            self._read, self._seen = self._file(path)
            if not given and not self._read:
                raise ConfigError(f"{flag}-file {path} names no key")

    def _file(self, path: str) -> tuple[frozenset[bytes], tuple[int, ...]]:
        flag = f"{self._flag}-file {path}"
        try:
            seen = _look_of(path)
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(f"{flag}: cannot read it: {reason}") from None
        if seen[-1] & (stat.S_IRWXO | stat.S_IWGRP):
            log.warning("event=key_file_is_open path=%s: others may read or write it; chmod 600", path)
        return frozenset(map(digest_of, keys_in(text, flag))), seen

    def follow(self) -> None:
        """Read the file again if it has changed. One that can't be read changes nothing; an emptied one has no keys."""
        if not self._path:
            return
        try:
            if _look_of(self._path) == self._seen:
                return
            self._read, self._seen = self._file(self._path)
        except (OSError, ConfigError) as error:
            if self._seen:
                log.error("event=keys_not_read flag=%s-file reason=%r", self._flag, str(error))
            self._seen = ()
            return
        log.info("event=keys_read flag=%s-file keys=%d", self._flag, len(self._read))

    def know(self, digest: bytes) -> bool:
        """A look-up that takes its time by the digest tells nothing: it is under our secret, so nobody can steer it."""
        return digest in self._given or digest in self._read


def _look_of(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


def upstream_bearer_line(key: str, path: str) -> bytes:
    """The Authorization line that instances are called with, or nothing. Raises ConfigError."""
    if key and path:
        raise ConfigError("--upstream-api-key and --upstream-api-key-file: give one of them")
    if path:
        try:
            found = keys_in(Path(path).read_text(encoding="utf-8"), f"--upstream-api-key-file {path}")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"--upstream-api-key-file {path}: cannot read it") from None
        if len(found) != 1:
            raise ConfigError(f"--upstream-api-key-file {path}: it must hold one key, and holds {len(found)}")
        return b"Authorization: Bearer %b\r\n" % found[0]
    if key:
        return b"Authorization: Bearer %b\r\n" % _checked(key, "--upstream-api-key")
    inherited = os.environ.get("OPENAI_API_KEY")
    return b"Authorization: Bearer %b\r\n" % _checked(inherited, "OPENAI_API_KEY") if inherited else b""

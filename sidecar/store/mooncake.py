"""Mooncake Store as a tier: blocks in the memory of every machine whose sidecar gives a segment to the same master.

The client lives in a process of its own (mooncake_process.py). An answer that is late means that process's death and a
pause; meanwhile everything is a miss. Blocks are sealed: a read that outlasts its lease may return other data.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sidecar.store.backoff import Backoff
from sidecar.store.contract import TierObserver
from sidecar.store.keys import BlockKey
from sidecar.store.mooncake_process import Answer, Get, Has, Leave, Put, Request, Setup, receive, send
from sidecar.store.sealed_block import HEADER_BYTES, fault, header_of

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 15.0
"""Importing Mooncake takes 0.3 s, and 2 s on a busy machine; setup with a master that is there 30 ms."""
CALL_TIMEOUT_S = 3.0
"""Without its master a get takes 4.3 s to fail (measured): that is no answer for somebody who could compute."""
LEAVE_TIMEOUT_S = 4.0
"""Taking the segment back takes two to three seconds (measured)."""
SLOW_S = 1.0
"""An answer that took longer counts as a failure: the next calls are spared."""
MIN_BUFFER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    host: str
    """Where other machines reach the segment."""
    master: str
    segment_bytes: int
    protocol: str = "tcp"
    device: str = ""


class _Away(Exception):
    """No answer."""


class MooncakeTier:
    """See contract.Tier. One call at a time: the client's process is the bottleneck anyway."""

    name = "mooncake"
    is_memory = False

    def __init__(self, settings: MooncakeSettings, observer: TierObserver) -> None:
        self._settings = settings
        self._observer = observer
        self._lock = threading.Lock()
        self._backoff = Backoff()
        self._writes = Backoff()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._closed = False

    def has(self, keys: Sequence[BlockKey], *, until_missing: bool) -> list[bool]:
        if not keys:
            return []
        answer = self._call(Has([_name(key) for key in keys]))
        if isinstance(answer, list) and len(answer) == len(keys):
            return answer
        return [False] * len(keys)

    def get(self, key: BlockKey, num_bytes: int) -> bytearray | None:
        value = self._call(Get(_name(key)))
        if not isinstance(value, bytes) or not value:
            return None
        sealed = memoryview(value)
        header, block = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:]
        kind = fault(header, block, key) or ("" if len(block) == num_bytes else "torn")
        if kind:
            self._observer.error(self.name, kind)
            logger.warning("store_bad_block tier=mooncake kind=%s key=%s action=skip", kind, key)
            return None
        return bytearray(block)

    def put(self, key: BlockKey, block: bytearray) -> bool:
        if self._writes.why:
            return False
        status = self._call(Put(_name(key), b"".join((header_of(key, block), block))))
        if status == 0:
            self._writes.succeeded()
            return True
        if status is not None:
            self._observer.error(self.name, "write")
            self._writes.failed(f"Mooncake Store took no block (status {status!r})")
        return False

    def usage(self) -> tuple[int, int]:
        """Only the master knows; its own /metrics says it."""
        return 0, 0

    def fault(self) -> str:
        return self._backoff.why or self._writes.why

    def close(self) -> None:
        self._closed = True
        if self._lock.acquire(timeout=LEAVE_TIMEOUT_S):  # else somebody waits for a client that hangs
            try:
                if self._sock is not None:
                    with contextlib.suppress(_Away):
                        self._exchange(self._sock, Leave(), LEAVE_TIMEOUT_S)
            finally:
                self._lock.release()
        self._kill()

    def _call(self, request: Request) -> Answer | None:
        """The answer, or None where there is none to be had now."""
        with self._lock:
            if self._closed or self._backoff.why:
                return None
            try:
                sock = self._connected()
                started_at = time.monotonic()
                answer = self._exchange(sock, request, CALL_TIMEOUT_S)
            except _Away as away:
                self._kill()
                if not self._closed:
                    self._observer.error(self.name, "away")
                    logger.warning("store_tier_away tier=mooncake error=%s", away)
                self._backoff.failed(str(away))
                return None
            if time.monotonic() - started_at > SLOW_S:
                self._backoff.failed("Mooncake Store is slow")
            else:
                self._backoff.succeeded()
            return answer

    def _connected(self) -> socket.socket:
        if self._sock is not None:
            return self._sock
        ours, theirs = socket.socketpair()
        quiet = None if logger.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sidecar.store.mooncake_process", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=quiet,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
        theirs.close()
        self._sock = ours
        settings = self._settings
        buffer_bytes = max(MIN_BUFFER_BYTES, settings.segment_bytes // 16)
        setup = Setup(
            settings.host, settings.master, settings.segment_bytes, buffer_bytes, settings.protocol, settings.device
        )
        answer = self._exchange(ours, setup, START_TIMEOUT_S)
        if answer is not True:
            raise _Away(answer if isinstance(answer, str) else "Mooncake Store did not start")
        logger.info("store_tier_ready tier=mooncake pid=%d master=%s", self._process.pid, settings.master)
        return ours

    def _exchange(self, sock: socket.socket, request: Request, timeout_s: float) -> Answer:
        """One request, one answer, all of it within `timeout_s` of silence. Raises _Away."""
        sock.settimeout(timeout_s)
        try:
            send(sock, request)
            answer: Answer = msgspec.msgpack.decode(receive(sock))
        except TimeoutError as error:
            raise _Away(f"no answer from Mooncake Store within {timeout_s:g} s") from error
        except (OSError, msgspec.DecodeError) as error:
            raise _Away(f"the process of Mooncake Store's client died ({error})") from error
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        sock, self._sock = self._sock, None
        if process is not None:
            process.kill()
            process.wait()
        if sock is not None:
            sock.close()


def _name(key: BlockKey) -> str:
    return f"baton/{key}"

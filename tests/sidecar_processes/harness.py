"""Real pd-sidecar processes and small fake engines, for tests that break one or the other."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from sidecar.client import SidecarClient
from sidecar.layout import KvLayout, Plane
from sidecar.protocol import Event, Offer, OfferEnded, PullEnded, PullSource, pack_block_ids
from tests.forked import popen

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK_BYTES = 8192
NUM_BLOCKS = 256


def a_layout(num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES, **changes: object) -> KvLayout:
    fields: dict[str, object] = {
        "num_blocks": num_blocks, "block_size": 16, "planes": (Plane(0, block_bytes, block_bytes),), "num_layers": 2,
        "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "model": "test", "order": "block,layer,kv,token,head",
    }  # fmt: skip
    return KvLayout(**(fields | changes))  # type: ignore[arg-type]


class Sidecar:
    """A pd-sidecar process, ready; its log goes to a file beside its socket. `prefix` goes before its command."""

    prefix: tuple[str, ...] = ()

    def __init__(self, directory: Path, name: str, transport: str, *flags: str, listen: str = "127.0.0.1:0") -> None:
        self.name = name
        self.socket_path = str(directory / f"{name}.sock")
        self.log_path = directory / f"{name}.log"
        command = [
            *self.prefix, sys.executable, "-m", "sidecar.cli",
            "--socket", self.socket_path, "--engine-id", name, "--listen", listen,
            "--transport", transport, *flags,
        ]  # fmt: skip
        with self.log_path.open("a") as log:
            self.process = popen(command, subprocess.PIPE, log)
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline().strip()
        self.process.stdout.close()
        if not self.ready_line.startswith("ready"):
            self.process.wait(10)
            raise AssertionError(f"{name} did not start: {self.log_path.read_text()}")
        self.fields = dict(field.split("=", 1) for field in self.ready_line.split()[1:])

    @property
    def listen(self) -> str:
        return self.fields["listen"]

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that is not enough; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                return self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def children(self) -> list[int]:
        """Process ids of its Mooncake processes."""
        path = Path(f"/proc/{self.process.pid}/task")
        return [int(pid) for task in path.iterdir() for pid in (task / "children").read_text().split()]

    def usage(self) -> tuple[int, int, int]:
        """Open descriptors, threads and mappings of shared memory, but for its own lease board."""
        proc = Path(f"/proc/{self.process.pid}")
        lines = (proc / "maps").read_text().splitlines()
        mappings = sum("memfd:" in line and not ("lease-board" in line and "rw-s" in line) for line in lines)
        return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir())), mappings

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.fields['metrics']}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, sample: str) -> float:
        """The value of one line of /metrics; 0 if it is not there."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(sample + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


class FakeEngine:
    """A pool filled with random bytes and the client of its sidecar."""

    def __init__(
        self, sidecar: Sidecar, layout: KvLayout | None = None, *, seed: int | None = None, direct: bool = False,
        sealable: bool = True,
    ) -> None:  # fmt: skip
        """`direct`: small pulls are copied by its client (see sidecar.direct); others of ours leave all to the sidecar,
        whose way is what most of these tests are about."""
        self.layout = layout or a_layout()
        flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0)
        self.fd = os.memfd_create(f"pool-{sidecar.name}", flags)
        os.ftruncate(self.fd, self.layout.pool_bytes)
        self.pool = mmap.mmap(self.fd, self.layout.pool_bytes)
        self.pool[:] = random.Random(seed).randbytes(self.layout.pool_bytes)
        self.events: list[Event] = []
        self._happened = threading.Event()
        self.client = SidecarClient.connect(sidecar.socket_path, on_event=self._happened.set)
        self._first = ctypes.c_char.from_buffer(self.pool)
        self.address = ctypes.addressof(self._first) if direct else 0
        self.epoch = self.client.register_pool(self.fd, self.layout, address=self.address)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.client.close()
        del self._first
        self.pool.close()
        with contextlib.suppress(OSError):
            os.close(self.fd)

    def block(self, block_id: int) -> bytes:
        size = self.layout.block_bytes
        return self.pool[block_id * size : (block_id + 1) * size]

    def fill(self, byte: int) -> None:
        self.pool[:] = bytes([byte]) * self.layout.pool_bytes

    def offer(
        self, block_ids: list[int], ttl_s: float = 30.0, *, names_blocks: bool = True
    ) -> tuple[Offer, PullSource]:
        """`names_blocks`: the source says which, as engines' sources do; without them a consumer has to claim first."""
        offer = self.client.offer(f"request-{time.monotonic_ns()}", block_ids, 16 * len(block_ids), ttl_s)
        hello = self.client.hello
        return offer, PullSource(
            hello.host, hello.port, hello.engine_id, offer.transfer_id, offer.token, offer.epoch, len(block_ids),
            pack_block_ids(block_ids) if names_blocks else b"",
        )  # fmt: skip

    def wait(self, wanted: Callable[[Event], bool], timeout_s: float = 20.0) -> Event:
        """The first event ever polled that is `wanted`."""
        end = time.monotonic() + timeout_s
        while True:
            self._happened.clear()
            self.events += self.client.poll()
            for event in self.events:
                if wanted(event):
                    return event
            if not self._happened.wait(max(0.0, end - time.monotonic())) and time.monotonic() > end:
                raise AssertionError(f"not within {timeout_s} s; seen: {self.events}")

    def pull_ended(self, pull_id: str, timeout_s: float = 20.0) -> PullEnded:
        event = self.wait(lambda event: isinstance(event, PullEnded) and event.pull_id == pull_id, timeout_s)
        assert isinstance(event, PullEnded)
        return event

    def offer_ended(self, transfer_id: str, timeout_s: float = 20.0) -> str:
        event = self.wait(lambda event: isinstance(event, OfferEnded) and event.transfer_id == transfer_id, timeout_s)
        assert isinstance(event, OfferEnded)
        return event.outcome

    def pull(
        self, source: PullSource | list[PullSource], local: list[int], pull_id: str = "", **options: float
    ) -> PullEnded:
        """Pull and wait for the end."""
        pull_id = pull_id or f"pull-{time.monotonic_ns()}"
        self.client.pull(pull_id, source, local, **options)  # type: ignore[arg-type]
        return self.pull_ended(pull_id)

    def count(self, pull_id: str) -> int:
        """How often a pull's end has been reported by now."""
        self.events += self.client.poll()
        return sum(isinstance(event, PullEnded) and event.pull_id == pull_id for event in self.events)


class EngineProcess:
    """A fake engine in a process of its own, to be killed: it registers a pool and does what it is told in JSON."""

    def __init__(self, sidecar: Sidecar) -> None:
        command = [sys.executable, "-m", "tests.sidecar_processes.engine_process", sidecar.socket_path]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def offer(self, block_ids: list[int], ttl_s: float) -> PullSource:
        return msgspec.convert(self._tell("offer", block_ids, ttl_s), PullSource)

    def pull(self, source: PullSource, local: list[int]) -> None:
        """Begin a pull."""
        self._tell("pull", msgspec.to_builtins(source), local)

    def save(self, block_hashes: list[bytes], block_ids: list[int]) -> None:
        """Begin a save of blocks that are all sevens."""
        self._tell("save", [block_hash.hex() for block_hash in block_hashes], block_ids)

    def _tell(self, *words: object) -> object:
        """One command, one answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def paused(*pids: int) -> Iterator[None]:
    """SIGSTOP these processes meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def eventually(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until `true()`; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def raw_connection(target: str) -> socket.socket:
    """A plain socket to a unix path or host:port."""
    if target.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(target)
        return sock
    host, port = target.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)

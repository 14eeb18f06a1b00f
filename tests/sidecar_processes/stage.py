"""A producer and a consumer of four processes, each of which can be killed or stopped, and put back."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from tests.sidecar_processes.harness import ROOT, Sidecar, a_layout, eventually

ENDS = ("p", "d")
PARTS = ("producer engine", "producer sidecar", "consumer engine", "consumer sidecar")
ANSWER_S = 20.0
CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 0.8
CLAIM_TTL_S = 0.9
DEADLINE_S = 3.0
FENCE_GRACE_S = 0.4
COPY_BYTES_PER_S = 1 << 20
FLAGS = (
    "--connect-timeout-s", str(CONNECT_TIMEOUT_S), "--answer-timeout-s", str(ANSWER_TIMEOUT_S),
    "--claim-ttl-s", str(CLAIM_TTL_S), "--stop-grace-s", "0.5", "--copy-bytes-per-s", str(COPY_BYTES_PER_S),
)  # fmt: skip


class Pool:
    """An engine's memory, made here: so it can still be looked at when the engine is dead."""

    def __init__(self, name: str) -> None:
        self.layout = a_layout()
        self.fd = os.memfd_create(f"pool-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.layout.pool_bytes)
        self.bytes = mmap.mmap(self.fd, self.layout.pool_bytes)

    def block(self, block_id: int) -> bytes:
        size = self.layout.block_bytes
        return self.bytes[block_id * size : (block_id + 1) * size]

    def fill(self, byte: int) -> None:
        self.bytes[:] = bytes([byte]) * len(self.bytes)

    def is_all(self, byte: int) -> bool:
        return self.bytes[:] == bytes([byte]) * len(self.bytes)

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


class LinkedEngine:
    """A scripted engine in a process of its own, see linked_engine.py."""

    def __init__(self, sidecar: Sidecar, pool: Pool) -> None:
        command = [
            sys.executable, "-m", "tests.sidecar_processes.linked_engine", sidecar.socket_path, str(pool.fd),
            msgspec.json.encode(pool.layout).decode(), str(FENCE_GRACE_S),
        ]  # fmt: skip
        with sidecar.log_path.with_suffix(".engine.log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                pass_fds=(pool.fd,),
            )  # fmt: skip
        assert self._line(ANSWER_S) == b"ready\n", sidecar.log_path.with_suffix(".engine.log").read_text()

    def say(self, *words: object) -> None:
        """A command, without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words).encode() + b"\n")

    def hear(self, timeout_s: float = ANSWER_S) -> Any:
        return json.loads(self._line(timeout_s))

    def ask(self, *words: object) -> Any:
        self.say(*words)
        return self.hear()

    def usage(self) -> tuple[int, int]:
        """Open descriptors and threads."""
        proc = Path(f"/proc/{self.process.pid}")
        return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _line(self, timeout_s: float) -> bytes:
        assert self.process.stdout is not None
        line, end = b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            assert select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0], "no answer"
            byte = os.read(self.process.stdout.fileno(), 65536)
            assert byte, "the engine has ended"
            line += byte
        return line


class Stage:
    """Four processes. `restore` puts back what died; `at_rest` says what any of them holds."""

    def __init__(self, directory: Path, transport: str) -> None:
        self.directory = directory
        self.transport = transport
        self.pools = {end: Pool(end) for end in ENDS}
        self.sidecars = {end: Sidecar(directory, end, transport, *FLAGS) for end in ENDS}
        self.engines = {end: LinkedEngine(self.sidecars[end], self.pools[end]) for end in ENDS}
        self._numbers = iter(range(1 << 30))
        self.pools["p"].bytes[:] = random.Random(7).randbytes(len(self.pools["p"].bytes))

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in self.engines.values():
            engine.kill()
        for sidecar in self.sidecars.values():
            sidecar.stop()
        for pool in self.pools.values():
            pool.close()

    def process(self, part: str) -> subprocess.Popen[Any]:
        end, what = ENDS[part.startswith("consumer")], part.split()[1]
        return self.sidecars[end].process if what == "sidecar" else self.engines[end].process

    def offer(self, block_ids: list[int]) -> dict[str, Any]:
        source: dict[str, Any] = self.engines["p"].ask("offer", block_ids, 30.0)
        return source

    def pull(self, source: dict[str, Any], block_ids: list[int]) -> str:
        """Begin; the id of the pull."""
        pull_id = f"pull-{next(self._numbers)}"
        self.engines["d"].ask("pull", pull_id, source, block_ids, DEADLINE_S)
        return pull_id

    def pull_ended(self, pull_id: str, within_s: float) -> tuple[bool, str]:
        """Whether it went well, and the reason if not; that it is reported in time, and once."""
        reports: list[list[Any]] = []
        end = time.monotonic() + within_s
        while not reports:
            assert time.monotonic() < end, f"{pull_id} has no end after {within_s:.1f} s"
            reports = self.engines["d"].ask("ended", pull_id)
        assert len(reports) == 1, reports
        return reports[0][0], reports[0][1]

    def arrived(self, remote: list[int], local: list[int]) -> bool:
        theirs, ours = self.pools["p"], self.pools["d"]
        return all(ours.block(to) == theirs.block(at) for at, to in zip(remote, local, strict=True))

    def recovers(self) -> bool:
        """Put back what is dead, also what its engine has just killed as hung, and move blocks."""
        self.restore()
        return self.works()

    def works(self) -> bool:
        """A whole transfer, as if nothing had been."""
        source = self.offer([1, 2, 3])
        if "error" in source:
            return False
        self.pools["d"].fill(0)
        ok, _ = self.pull_ended(self.pull(source, [9, 8, 7]), ANSWER_S)
        if not ok:
            self.engines["p"].ask("revoke", source["transfer_id"])
        return ok and self.arrived([1, 2, 3], [9, 8, 7])

    def restore(self) -> None:
        """Resume or start again, at the same addresses, whatever is not running, and wait until it all works."""
        for part in PARTS:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process(part).pid, signal.SIGCONT)
        self._start_sidecars()
        for end, engine in self.engines.items():
            if engine.process.poll() is not None:
                engine.kill()
                self.engines[end] = LinkedEngine(self.sidecars[end], self.pools[end])
        eventually(self._is_linked)

    def _start_sidecars(self) -> None:
        for end, sidecar in self.sidecars.items():
            if sidecar.process.poll() is not None:
                self.sidecars[end] = Sidecar(self.directory, end, self.transport, *FLAGS, listen=sidecar.listen)

    def _is_linked(self) -> bool:
        self._start_sidecars()  # an engine may kill one as hung at any time until it is linked again
        return all(engine.ask("epoch") for engine in self.engines.values())

    def usage(self) -> dict[str, int]:
        """Descriptors, threads and mapped pools of each process, and the leases out."""
        found: dict[str, int] = {}
        for end in ENDS:
            sidecar = self.sidecars[end]
            counts = zip(("descriptors", "threads", "mappings"), sidecar.usage(), strict=True)
            found |= {f"{end} sidecar {what}": count for what, count in counts}
            counts = zip(("descriptors", "threads"), self.engines[end].usage(), strict=False)
            found |= {f"{end} engine {what}": count for what, count in counts}
            for state in ("offered", "claimed"):
                found[f"{end} leases {state}"] = int(sidecar.metric(f'baton_sidecar_leases{{state="{state}"}}'))
        return found


@contextlib.contextmanager
def struck(stage: Stage, part: str, how: str) -> Iterator[float]:
    """Kill or stop `part`; yields when. It is put back in the end."""
    process = stage.process(part)
    process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    if how == "kill":
        process.wait()
    else:
        eventually(lambda: Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt")
    try:
        yield time.monotonic()
    finally:
        process.send_signal(signal.SIGCONT)

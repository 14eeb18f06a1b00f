"""What `up` looks at on this machine before it starts anything: directories, ports, memory, commands, the model."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine_adapter.cluster.config import ClusterConfig, fixed_ports
from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.plan import SOCKET_PATH_LIMIT, Plan, kv_pool_bytes

CHOSEN_PORTS = range(17001, 20000)
"""Above Mooncake's own ports (15000-17000), below ADXL's (20000 + 1000 per device) and below the kernel's ephemeral
ones: an outgoing connection never takes the port of a process that is down for a moment."""

LONGEST_SOCKET_NAME = len("/prefill-1023.sock.peer")


def environment(own_first: bool = True) -> dict[str, str]:
    """Ours, with the directory of this Python on PATH: a virtual environment need not be activated.

    Last on it where the commands are not only ours, such as `vllm`: the user's PATH says which one is meant.
    """
    own, given = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return os.environ | {"PATH": os.pathsep.join([own, given] if own_first else [given, own])}


def model_directory(config: ClusterConfig, state_dir: Path) -> Path:
    """Where the model is, or is to be made."""
    made = config.model.make
    if made is None:
        return Path(config.model.path or "").expanduser()
    return state_dir / "models" / f"{made.family}-{made.size}{f'-{made.seed}' if made.seed else ''}"


def num_cores() -> int:
    """Cores this process may use: its affinity, and the container's quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def memory_available_bytes() -> int | None:
    """What can still be allocated, or None where the system does not tell."""
    available = None
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        left = limit - int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available or left, left)
    return available


def port_problem(host: str, port: int) -> str | None:
    """Why nobody could listen there now, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is occupied"
            return f"cannot be listened on: {os.strerror(error.errno) if error.errno else error}"
    return None


def choose_ports(host: str, num: int, config: ClusterConfig) -> tuple[int, ...]:
    """`num` ports free on `host` now and not fixed in the file. Raises ClusterError."""
    taken = {port for port, _ in fixed_ports(config)}
    start = random.randrange(len(CHOSEN_PORTS))
    chosen: list[int] = []
    for i in range(len(CHOSEN_PORTS)):
        if len(chosen) == num:
            break
        port = CHOSEN_PORTS[(start + i) % len(CHOSEN_PORTS)]
        if port not in taken and port_problem(host, port) is None:
            chosen.append(port)
    if len(chosen) < num:
        raise ClusterError(
            f"{num} free ports are needed on {host} and {len(chosen)} of {CHOSEN_PORTS.start}-{CHOSEN_PORTS.stop - 1} "
            "are free; is cluster.host an address of this machine?"
        )
    return tuple(chosen)


def socket_directory(run_dir: Path) -> Path:
    """Where the unix sockets of the cluster that runs in `run_dir` go: the same place each time, and short."""
    key = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:10]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK | os.X_OK) and fits(f"{runtime}/baton-{key}"):
        return Path(runtime) / f"baton-{key}"
    return Path("/tmp") / f"baton-{os.getuid()}-{key}"


def fits(directory: str) -> bool:
    return len(os.fsencode(directory)) + LONGEST_SOCKET_NAME <= SOCKET_PATH_LIMIT


def make_private(directory: Path) -> None:
    """Make it, mode 0700 and empty. Raises ClusterError if somebody else's stands there."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    there = directory.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid():
        raise ClusterError(f"{directory} belongs to somebody else; set XDG_RUNTIME_DIR to a directory of yours")
    directory.chmod(0o700)
    for left in directory.iterdir():
        left.unlink()


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory: one `up` a cluster. Raises ClusterError if another holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = run_dir / "supervisor.pid"
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ClusterError(
                f"this cluster is already up (pid {file.read().strip()}, {run_dir}); stop it first, "
                "or give the file another cluster.name"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def problems(config: ClusterConfig, plan: Plan, model_dir: Path, env: Mapping[str, str]) -> list[str]:
    """Everything that would keep the plan from starting here, one line each with what to do."""
    found = [*_missing_commands(plan, env), *_occupied_ports(config, plan), *_memory_problem(config, model_dir)]
    if not config.model.make and not (model_dir / "config.json").is_file():
        what = "has no config.json" if model_dir.is_dir() else "does not exist"
        found.append(
            f"model directory {model_dir} {what}; give a Hugging Face model directory, "
            f"or make one: pd-engine make-model {model_dir} --family qwen3 --size tiny"
        )
    return found


def _missing_commands(plan: Plan, env: Mapping[str, str]) -> list[str]:
    words = dict.fromkeys(process.argv[0] for process in plan.processes)
    return [f"{word}: no such command on PATH; run `make install`" for word in words if not _which(word, env)]


def _which(word: str, env: Mapping[str, str]) -> str | None:
    return shutil.which(word, path=env.get("PATH"))


def _occupied_ports(config: ClusterConfig, plan: Plan) -> list[str]:
    remedy = "stop what listens there or give another"
    found = []
    for process in plan.processes:
        for port in process.ports:
            problem = port_problem(process.host, port)
            if problem:
                hint = (
                    f"{remedy} (proxy.port, --port)"
                    if process.kind == "proxy"
                    else f"{remedy}, or 0 to have one chosen"
                )
                found.append(f"port {port} on {process.host} for {process.name} {problem}; {hint}")
    return found


def _memory_problem(config: ClusterConfig, model_dir: Path) -> list[str]:
    available = memory_available_bytes()
    needed = kv_pool_bytes(config, block_bytes(model_dir, config))
    if available is None or needed <= available:
        return []
    return [
        f"the KV pools need {needed / 1024**3:.1f} GiB of shared memory together and {available / 1024**3:.1f} GiB are "
        "free; lower engine.kv_pool (or num_blocks) or the number of instances"
    ]


def block_bytes(model_dir: Path, config: ClusterConfig) -> int:
    """Bytes of one KV block over all layers by the model's config.json (keys: transformers), 0 if it does not tell."""
    try:
        model = json.loads((model_dir / "config.json").read_text())
        num_heads = model["num_attention_heads"]
        head_dim = model.get("head_dim") or model["hidden_size"] // num_heads
        num_kv_heads = model.get("num_key_value_heads") or num_heads
        dtype = config.model.dtype if config.model.dtype != "auto" else str(model.get("dtype", "bfloat16"))
        item_bytes = 4 if dtype == "float32" else 2
        return int(model["num_hidden_layers"] * 2 * config.engine.block_size * num_kv_heads * head_dim * item_bytes)
    except (OSError, ValueError, KeyError, TypeError):
        return 0

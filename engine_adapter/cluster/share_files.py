"""The files that a node's processes read: written where they are started, gone when they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine_adapter.cluster.child import Child, Guard
from engine_adapter.cluster.errors import ClusterError, StartFailed
from engine_adapter.cluster.processes import File

NUM_LAST_LINES = 5


def differing(files: Sequence[File]) -> list[str]:
    """A line for each that is there with other contents."""
    return [
        f"{file.path} is there already with other contents; move it away, or start in another directory"
        for file in files
        if file.text is not None and Path(file.path).exists() and Path(file.path).read_text() != file.text
    ]


async def write(
    files: Sequence[File], deployment: Path, env: Mapping[str, str], log_dir: Path, guard: Guard
) -> list[str]:
    """What is not there yet. What only a command can make stays for the next time. Raises ClusterError.

    Returns what was written.
    """
    absent = _absent(files)
    for file in absent:
        if file.text is None:
            await _make(file, deployment, env, log_dir, guard)
        else:
            _write(Path(file.path), file.text, guard)
    return [file.path for file in absent]


def _absent(files: Sequence[File]) -> list[File]:
    return [file for file in files if not Path(file.path).exists()]


def _write(path: Path, text: str, guard: Guard) -> None:
    guard.remove_at_end(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; the processes read it there") from error


async def _make(file: File, deployment: Path, env: Mapping[str, str], log_dir: Path, guard: Guard) -> None:
    argv = [str(deployment) if word == "${DEPLOYMENT}" else word for word in file.made_by]
    child = Child(argv, env, log_dir / f"{Path(file.path).name}.log", guard)
    try:
        status = await child.wait()
    finally:
        child.kill()
        await child.wait()
    if status != 0:
        raise StartFailed(f"{file.path} could not be made:", *child.log.last_lines(NUM_LAST_LINES))

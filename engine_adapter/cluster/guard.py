"""`python -I -S guard.py`: outlives the supervisor by a moment, to end what it may have left.

Standard library only, run by path. Reads lines from standard input: `+PGID` and `-PGID` (a process group began, was
seen to end), `rm PATH` (a directory or a file that goes with the cluster). At the end of the input, that is when the
supervisor is gone, however it went, the groups still there are killed and the paths removed. The children themselves
already die by PR_SET_PDEATHSIG; their own children and the socket files are what only the guard gets.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterable


def main(lines: Iterable[str]) -> None:
    groups: set[int] = set()
    paths: list[str] = []
    for line in lines:
        word = line.rstrip("\n")
        if word.startswith("+"):
            groups.add(int(word))
        elif word.startswith("-"):
            groups.discard(-int(word))
        elif word.startswith("rm "):
            paths.append(word.removeprefix("rm "))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for path in paths:
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main(sys.stdin)

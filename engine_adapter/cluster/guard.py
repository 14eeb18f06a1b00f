"""`python -I -S guard.py`: outlives the supervisor by a moment, to end what it may have left.

Standard library only, run by path. Reads lines from standard input: `+PGID` and `-PGID` (a process group began, was
seen to end), `rm DIR` (a directory that goes with the cluster). At the end of the input, that is when the supervisor
is gone, however it went, the groups still there are killed and the directories removed. The children themselves
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
    directories: list[str] = []
    for line in lines:
        word = line.rstrip("\n")
        if word.startswith("+"):
            groups.add(int(word))
        elif word.startswith("-"):
            groups.discard(-int(word))
        elif word.startswith("rm "):
            directories.append(word.removeprefix("rm "))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main(sys.stdin)

"""`python -I -S trampoline.py SUPERVISOR_PID COMMAND...`: become COMMAND, bound to die with the supervisor.

Standard library only, run by path. PR_SET_PDEATHSIG survives execve, and asks the kernel for SIGKILL when the thread
that forked us ends, `kill -9` of it included (prctl(2)).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_FOUND, NOT_EXECUTABLE = 127, 126


def main(arguments: list[str]) -> int:
    supervisor_pid, command = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        print(f"prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return NOT_EXECUTABLE
    if os.getppid() != supervisor_pid:  # it died before prctl was called
        return NOT_EXECUTABLE
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        print(f"{command[0]}: no such command on PATH", file=sys.stderr)
        return NOT_FOUND
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

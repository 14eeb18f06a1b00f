"""What can be wrong with a deployment, and with which status the command ends.

2: the file or a flag is written wrongly (the writer's mistake); 1: it is well written and cannot run here.
Every message is one line that says what is wrong and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClusterError(Exception):
    """Cannot run here: an occupied port, a missing model. `problems` holds one line each."""

    status = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ConfigError(ClusterError):
    """The file, or a flag, is not understood."""

    status = 2


class StartFailed(ClusterError):
    """A process died, or stayed unwell, before the cluster was first ready."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the known word closest to `word`, or, if none is close, all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(names)}"

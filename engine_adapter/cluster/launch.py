"""Where `pd-cluster` starts: Ctrl-C ends it quietly while its libraries are still being imported.

The imports take over a second, in which Python would answer Ctrl-C with a traceback out of whatever file it reads.
Nothing has been started by then, so there is nothing to stop.
"""

from __future__ import annotations

import importlib
import signal
from typing import NoReturn


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cli = importlib.import_module("engine_adapter.cluster.cli")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(cli.main())

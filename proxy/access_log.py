"""One line a request, written a few times a second: formatting and writing each at once would cost a tenth of a
request."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

MAX_HELD_LINES = 10_000
_CLOCK = "%Y-%m-%dT%H:%M:%S"


class LogFormat(logging.Formatter):
    """Every other line of the log, with the time written as the access log has it."""

    default_time_format = _CLOCK
    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")


class AccessLog:
    def __init__(self, enabled: bool, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._held: list[tuple[float, str]] = []

    def add(self, line: str) -> None:
        self._held.append((time.time(), line))
        if len(self._held) > MAX_HELD_LINES:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        held, self._held = self._held, []
        text = []
        second, clock = -1, ""
        for stamp, line in held:
            if int(stamp) != second:
                second = int(stamp)
                clock = time.strftime(_CLOCK, time.localtime(second))
            text.append(f"{clock}.{int(stamp % 1 * 1000):03d} INFO proxy.access {line}\n")
        try:
            self._stream.write("".join(text))
            self._stream.flush()
        except (OSError, ValueError):
            self.enabled = False  # nobody reads: going on serving matters more

"""One line a request, written a few times a second: formatting and writing each at once would cost a tenth of a
request."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter
from typing import TextIO

import orjson

from proxy.config import AccessLogForm

Value = str | int | float | None
MAX_HELD_LINES = 10_000
MAX_WORD_CHARS = 256
_CLOCK = "%Y-%m-%dT%H:%M:%S"
# In the order of the line. Waits and scores are in seconds; `*_choice` is what decided, `*_wait_s` the expected wait on
# the chosen instance and `*_next_wait_s` that on the best of the others.
FIELDS = (
    "request_id", "route", "model", "stream", "status", "outcome", "prompt_tokens", "output_tokens", "queue_s",
    "prefill_s", "handoff_s", "ttft_s", "e2e_s", "prefiller", "decoder", "retries", "continued", "prefill_choice",
    "prefill_wait_s", "prefill_next_wait_s", "decode_choice", "decode_wait_s", "decode_next_wait_s",
)  # fmt: skip
_OF_STREAMS = frozenset(("handoff_s", "ttft_s"))
_WHOLE = " ".join(
    f"{name}=" + ("-%.0s" if name in _OF_STREAMS else "%.4f" if name.endswith("_s") else "%s") for name in FIELDS
)
_STREAM = " ".join(f"{name}=" + ("%.4f" if name.endswith("_s") else "%s") for name in FIELDS)
_TTFT = FIELDS.index("ttft_s")
_MAY_LACK = itemgetter(*map(FIELDS.index, ("output_tokens", "prefiller", "decoder")))
_ANY = " ".join(f"{name}=%s" for name in FIELDS)
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+", re.ASCII)  # printable, without blank, quote, "=" and backslash


class LogFormat(logging.Formatter):
    """Every other line of the log, with the time written as the access log has it."""

    default_time_format = _CLOCK
    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")


class AccessLog:
    """`add` takes the values of `FIELDS`; seconds are floats, None is "unknown" or "not reached"."""

    def __init__(self, form: AccessLogForm, stream: TextIO | None = None) -> None:
        self.enabled = form != "off"
        self._line: Callable[[str, tuple[Value, ...]], str] = _json_line if form == "json" else _text_line
        self.word: Callable[[object], str | None] = _bounded if form == "json" else _word_of
        """For what a client sent: as it may stand in `add`'s values."""
        self._stream = stream if stream is not None else sys.stderr
        self._held: list[tuple[float, tuple[Value, ...]]] = []

    def add(self, values: tuple[Value, ...]) -> None:
        self._held.append((time.time(), values))
        if len(self._held) > MAX_HELD_LINES:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        held, self._held = self._held, []
        text = []
        second, clock = -1, ""
        for stamp, values in held:
            if int(stamp) != second:
                second = int(stamp)
                clock = time.strftime(_CLOCK, time.localtime(second))
            text.append(self._line(f"{clock}.{int(stamp % 1 * 1000):03d}", values))
        try:
            self._stream.write("".join(text))
            self._stream.flush()
        except (OSError, ValueError):
            self.enabled = False  # nobody reads: going on serving matters more


def _text_line(clock: str, values: tuple[Value, ...]) -> str:
    try:
        if None in _MAY_LACK(values):
            raise TypeError
        line = (_WHOLE if values[_TTFT] is None else _STREAM) % values
    except TypeError:  # something is missing
        line = _ANY % tuple(map(_word, values))
    return f"{clock} INFO proxy.access {line}\n"


def _word(value: Value) -> str:
    if type(value) is float:
        return f"{value:.4f}"
    return "-" if value is None else str(value)


def _json_line(clock: str, values: tuple[Value, ...]) -> str:
    told: dict[str, Value] = {"time": clock, "event": "request"}
    for name, value in zip(FIELDS, values, strict=True):
        told[name] = round(value, 6) if type(value) is float else value
    told["stream"], told["continued"] = bool(told["stream"]), bool(told["continued"])
    return orjson.dumps(told).decode() + "\n"


def _bounded(sent: object) -> str | None:
    if type(sent) is not str or not sent:
        return None
    return sent if len(sent) <= MAX_WORD_CHARS else sent[: MAX_WORD_CHARS - 1] + "~"


def _word_of(sent: object) -> str:
    """As one word that no line can be forged with."""
    word = _bounded(sent)
    return "-" if word is None else _quoted(word)


@lru_cache(maxsize=1024)  # a fleet has few models
def _quoted(word: str) -> str:
    """In quotes, with escapes, where it is not plain."""
    if _PLAIN.fullmatch(word):
        return word
    return '"' + word.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'

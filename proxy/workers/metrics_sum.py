"""One exposition out of those of all workers. Pure: families as plain lists, so that any family joins by its kind.

| kind | joined by |
|---|---|
| counter, histogram, summary | the sum; what a worker that died had counted stays in it |
| gauge | as it is declared, or by the end of its name as below, else the sum |
| others | the first that is there |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

Family = list[Any]  # [name, kind, text, [[sample name, {label: value}, value], ...]], as it travels
NOTHING: Mapping[str, str] = {}
ADDITIVE = frozenset({"counter", "histogram", "summary"})

# What every worker sees of the same thing is not to be added up. By the end of a gauge's name.
GAUGE_ENDINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("_healthy", "_enabled", "_up", "_start_time_seconds", "_created"), "min"),
    (("_limit", "_lag_seconds", "_info", "_ratio", "_max_fds", "_timestamp_seconds", "_workers"), "max"),
    (("_per_second",), "mean"),
)
_JOIN: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "min": min,
    "max": max,
    "mean": lambda values: sum(values) / len(values),
    "first": lambda values: values[0],
}


def how(name: str, kind: str, sample: str, declared: Mapping[str, str] = NOTHING) -> str:
    """How a sample of a family is joined: a key of `_JOIN`. `declared` has it for some gauges, by their names."""
    if sample.endswith("_created"):
        return "min"
    if kind in ADDITIVE:
        return "sum"
    if kind != "gauge":
        return "first"
    if name in declared:
        return declared[name]
    return next((rule for endings, rule in GAUGE_ENDINGS if name.endswith(endings)), "sum")


def joined(expositions: Iterable[list[Family]], declared: Mapping[str, str] = NOTHING) -> list[Family]:
    """In the order in which families and samples are seen first."""
    families: dict[str, tuple[Family, dict[tuple[Any, ...], tuple[list[Any], list[float]]]]] = {}
    for exposition in expositions:
        for name, kind, text, samples in exposition:
            _, rows = families.setdefault(name, ([name, kind, text], {}))
            for sample, labels, value in samples:
                key = (sample, *sorted(labels.items()))
                found = rows.setdefault(key, ([sample, labels], []))[1]
                if value is not None:  # JSON has no NaN
                    found.append(value)
    return [
        [*head, [[*named, _join(how(head[0], head[1], named[0], declared), values)] for named, values in rows.values()]]
        for head, rows in families.values()
    ]


def _join(rule: str, values: list[float]) -> float | None:
    return _JOIN[rule](values) if values else None


def additive(exposition: list[Family]) -> list[Family]:
    """What must never go backwards."""
    return [family for family in exposition if family[1] in ADDITIVE]


class Kept:
    """The parent's: what each worker had counted when it was heard last, and what the dead ones had together.

    Whatever a scrape has shown has passed here, so a sum with what is kept can't be less than an earlier one."""

    def __init__(self) -> None:
        self._latest: dict[int, bytes] = {}
        self._ended: list[Family] = []

    def heard(self, worker: int, exposition: bytes) -> None:
        self._latest[worker] = exposition

    def ended(self, worker: int) -> None:
        latest = self._latest.pop(worker, None)
        if latest:
            self._ended = joined([self._ended, additive(orjson.loads(latest))])

    def dump(self) -> bytes:
        """For `read_kept`."""
        latest = {str(worker): orjson.Fragment(exposition) for worker, exposition in self._latest.items()}
        return orjson.dumps([self._ended, latest])


def read_kept(dumped: bytes, silent: Iterable[int]) -> list[list[Family]]:
    """What is to be added to the workers' own: of those that ended, and of those that do not answer."""
    if not dumped:
        return []
    ended, latest = orjson.loads(dumped)
    return [ended, *(additive(latest[str(worker)]) for worker in silent if str(worker) in latest)]

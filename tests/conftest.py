"""What spares the workers of `pytest -n` time: the order of files, and what the garbage collector need not see."""

from __future__ import annotations

import gc
from itertools import chain, zip_longest

import pytest

gc.disable()  # until the tests are collected: nothing of them is garbage

WAITING = ("tests/sidecar_processes/", "tests/proxy_blackbox/")
"""Most of their time is time-outs and leases of processes: the cores are free meanwhile. Sorted backwards."""


@pytest.hookimpl(trylast=True)  # pytest itself puts some files last, long ones among them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait take turns with files that compute. The shorter ones, of tests/unit, come last by their names:
    no worker ends with a long one while the others have nothing left."""
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.nodeid.split("::")[0], []).append(item)
    waiting = sorted((file for file in by_file if file.startswith(WAITING)), reverse=True)
    computing = sorted(file for file in by_file if not file.startswith(WAITING))
    turns = chain.from_iterable(zip_longest(waiting, computing))
    items[:] = [item for file in turns if file is not None for item in by_file[file]]


def pytest_collection_finish() -> None:
    """Thousands of tests, torch and transformers stay: the collector needn't walk them again and again."""
    gc.freeze()
    gc.enable()

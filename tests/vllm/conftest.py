"""These tests run by `make test-vllm` only: they need an environment with vLLM in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.servers import VLLM_VENV, Server, baton, proxy_server, running, vllm_server
from tests.vllm.splits import Split

collect_ignore_glob = [] if VLLM_VENV else ["test_*.py"]

ORDER = (
    "test_split.py", "test_layerwise.py", "test_prefix_store.py", "test_topologies.py", "test_tensor_parallel.py",
    "test_memory.py", "test_others.py", "test_recipes.py",
)  # fmt: skip
"""What matters most comes first: CI has only so much time for these."""
LAST = "test_a_prefiller_that_dies_leaves_clean_errors"
"""Nothing prefills on the shared prefiller after it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(ORDER)}
    items.sort(key=lambda item: len(rank) if item.name == LAST else rank.get(item.path.name, -1))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    command = Path(sys.executable).parent / "pd-engine"
    subprocess.run([str(command), "make-model", str(directory)], check=True, timeout=120)
    return directory


@pytest.fixture(scope="session")
def unsplit(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What every answer is compared with."""
    server = vllm_server("unsplit", model, tmp_path_factory.mktemp("logs"))
    with running(server):
        yield server


@pytest.fixture(scope="session")
def split(model: Path, unsplit: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    logs = tmp_path_factory.mktemp("logs")
    prefiller = vllm_server("prefiller", model, logs, baton("kv_producer", role="prefill", lease_s=20))
    decoder = vllm_server("decoder", model, logs, baton("kv_consumer", role="decode", pull_timeout_s=30))
    proxy = proxy_server([prefiller], [decoder], logs)
    with running(prefiller, decoder), running(proxy):
        yield Split(prefiller, decoder, proxy, unsplit)

"""A tiny model for the session, and what a stranger would find missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.deployment import BIN


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 made by `pd-engine make-model`."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run(
        [str(BIN / "pd-engine"), "make-model", str(directory), "--family", "qwen3", "--size", "tiny"],
        check=True,
        timeout=120,
    )
    return directory

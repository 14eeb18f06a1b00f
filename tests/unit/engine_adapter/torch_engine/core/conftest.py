from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine_adapter.torch_engine.make_model import make_model
from engine_adapter.torch_engine.model_loader import LoadedModel, load_model
from tests.unit.engine_adapter.torch_engine.core.harness import CPU


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from more, and on a busy machine threads wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A made model's directory by family and size; made once a session."""
    made: dict[tuple[str, str], Path] = {}

    def directory(family: str = "qwen3", size: str = "tiny") -> Path:
        if (family, size) not in made:
            made[family, size] = tmp_path_factory.mktemp(f"{family}-{size}")
            make_model(made[family, size], family, size)
        return made[family, size]

    return directory


@pytest.fixture(scope="session")
def loaded(model_dir: Callable[[str, str], Path]) -> Callable[[str, str], LoadedModel]:
    """A made model loaded in float32 by family and size; loaded once a session."""
    models: dict[tuple[str, str], LoadedModel] = {}

    def model(family: str = "qwen3", size: str = "tiny") -> LoadedModel:
        if (family, size) not in models:
            models[family, size] = load_model(model_dir(family, size), "float32", CPU, 2048)
        return models[family, size]

    return model


@pytest.fixture
def tiny(loaded: Callable[[str, str], LoadedModel]) -> LoadedModel:
    return loaded("qwen3", "tiny")

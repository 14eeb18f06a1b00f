"""What our connector takes from vLLM, as the versions have it (kv-contracts 1.9): names, constructors, hooks.

Installed in the place of vLLM, which this environment lacks; tests/vllm runs the connector in the real one.
"""

from __future__ import annotations

import enum
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

VERSIONS = ((0, 11), (0, 13), (0, 18), (0, 23), (0, 32))
OURS = "engine_adapter.vllm_connector"


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


def modules(version: tuple[int, int]) -> dict[str, ModuleType]:
    """The modules of one version, by name."""
    names = ["vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.distributed.kv_transfer"]
    connector = "vllm.distributed.kv_transfer.kv_connector"
    names += [connector, f"{connector}.factory", f"{connector}.v1", f"{connector}.v1.base"]
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    made["vllm"].__version__ = f"{version[0]}.{version[1]}.0"  # type: ignore[attr-defined]
    made["vllm.distributed.parallel_state"].get_tensor_model_parallel_rank = lambda: 0  # type: ignore[attr-defined]
    made[f"{connector}.factory"].KVConnectorFactory = _factory()  # type: ignore[attr-defined]
    vars(made[f"{connector}.v1.base"]).update(_base(version))
    return made


def _factory() -> Any:
    class KVConnectorFactory:
        _registry: dict[str, Any] = {}  # noqa: RUF012

        @classmethod
        def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
            if name in cls._registry:
                raise ValueError(f"Connector '{name}' is already registered.")
            cls._registry[name] = (module_path, class_name)

    return KVConnectorFactory


def _base(version: tuple[int, int]) -> dict[str, Any]:
    class KVConnectorMetadata:
        pass

    class KVConnectorBase(ABC):
        def __init__(self, vllm_config: Any, role: Role, *rest: Any) -> None:
            assert len(rest) == (1 if version >= (0, 13) else 0), "the constructor takes other arguments"
            self._connector_metadata: Any = None

        def bind_connector_metadata(self, meta: Any) -> None:
            self._connector_metadata = meta

        @abstractmethod
        def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

        @abstractmethod
        def wait_for_layer_load(self, layer_name: str) -> None: ...

        @abstractmethod
        def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

        @abstractmethod
        def wait_for_save(self) -> None: ...

        @abstractmethod
        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]: ...

        @abstractmethod
        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

        @abstractmethod
        def build_connector_meta(self, scheduler_output: Any) -> Any: ...

    found: dict[str, Any] = {
        "KVConnectorBase_V1": KVConnectorBase,
        "KVConnectorMetadata": KVConnectorMetadata,
        "KVConnectorRole": Role,
    }
    if version >= (0, 13):
        found["SupportsHMA"] = _hma()
        KVConnectorBase.get_block_ids_with_load_errors = lambda self: set()  # type: ignore[attr-defined]
    if version >= (0, 32):
        found["KVConnectorTransferResults"] = _results()
    return found


def _hma() -> type:
    class SupportsHMA(ABC):
        @abstractmethod
        def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any: ...

    return SupportsHMA


def _results() -> type:
    @dataclass
    class KVConnectorTransferResults:
        finished_sending: set[str] = field(default_factory=set)
        finished_recving: set[str] = field(default_factory=set)
        failed_recving: set[str] = field(default_factory=set)

    return KVConnectorTransferResults


def install(version: tuple[int, int]) -> None:
    """Put a version in place for good."""
    sys.modules.update(modules(version))


def _loaded() -> list[str]:
    return [name for name in sys.modules if name == "vllm" or name.startswith(("vllm.", OURS))]


@contextmanager
def connector_under(version: tuple[int, int]) -> Iterator[Any]:
    """The module `engine_adapter.vllm_connector.connector`, loaded afresh under a version."""
    before = {
        name: module for name, module in sys.modules.items() if name == "vllm" or name.startswith(("vllm.", OURS))
    }
    for name in before:
        del sys.modules[name]
    install(version)
    try:
        yield importlib.import_module(f"{OURS}.connector")
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def config(kv_role: str = "kv_both", tensor_parallel_size: int = 1, **extra: Any) -> Any:
    """A VllmConfig as far as we read it."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_role=kv_role, kv_connector_extra_config=extra, engine_id="e"),
        cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=8, cache_dtype="auto"),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=1, data_parallel_rank=0
        ),
    )


def caches(num_groups: int = 1) -> Any:
    """A KVCacheConfig."""
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    return SimpleNamespace(kv_cache_groups=[group] * num_groups, num_blocks=8)


def request(request_id: str, params: dict[str, Any] | None, num_tokens: int = 40, status: str = "RUNNING") -> Any:
    """A Request; prefilled, if it has ended."""
    return SimpleNamespace(
        request_id=request_id,
        kv_transfer_params=params,
        num_tokens=num_tokens,
        all_token_ids=list(range(num_tokens)),
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        num_prompt_tokens=num_tokens,
        num_computed_tokens=num_tokens,
        num_cached_tokens=0,
        status=SimpleNamespace(name=status),
    )

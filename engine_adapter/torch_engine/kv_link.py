"""The engine's connection to its sidecar as the wiring holds it: made at start, let go at the end, asked for health."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.kv_transfer import PullResult
from engine_adapter.torch_engine.server_config import ServerConfig


class KvLink(Protocol):
    @property
    def name(self) -> str:
        """For the ready line: none, or the sidecar's socket."""

    @property
    def available(self) -> bool:
        """False while the sidecar is away."""


class NoKvLink:
    name = "none"
    available = True


@contextmanager
def build_kv_transfer(
    config: ServerConfig, engine: Engine, observe_pull: Callable[[PullResult], None]
) -> Iterator[KvLink]:
    """Give the engine its KvTransfer, if it is to have one. Raises EngineStartError where the sidecar can't be had."""
    if config.sidecar == "none":
        yield NoKvLink()
        return
    raise EngineStartError(f"--sidecar {config.sidecar} can't be used yet", "give --sidecar none")

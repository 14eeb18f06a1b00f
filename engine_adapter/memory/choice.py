"""Which memory provider an engine uses: the one asked for, or the first that can work. Pure."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from engine_adapter.memory.contract import MemoryProvider, Place
from engine_adapter.memory.device_ipc import DeviceIpc
from engine_adapter.memory.in_process import InProcess
from engine_adapter.memory.shm import SharedMemory
from engine_adapter.memory.staging import Staging

logger = logging.getLogger(__name__)

PROVIDERS: dict[str, MemoryProvider] = {
    provider.name: provider for provider in (SharedMemory(), DeviceIpc(), Staging(), InProcess())
}
"""Best first: without a copy, then with one, then without a process of its own."""


class NoProvider(Exception):
    """The provider asked for can't work here, or none can. `reason` says why, and what would help."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Choice:
    """A provider, where it is to work, and why those before it can't."""

    provider: MemoryProvider
    place: Place
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def needs_shared_pool(self) -> bool:
        return self.provider.needs_shared_pool(self.place)

    @property
    def stages(self) -> bool:
        return self.provider.stages(self.place)

    def __str__(self) -> str:
        """For the log: `device_ipc: refused, expandable segments are on; staging is used`."""
        return "".join(f"{name}: refused, {why}; " for name, why in self.refused) + f"{self.provider.name} is used"


def choose(wanted: str, place: Place) -> Choice:
    """`wanted` is a provider's name, or auto. Raises NoProvider."""
    if wanted != "auto":
        provider = PROVIDERS[wanted]
        if why := provider.lacking(place):
            raise NoProvider(why)
        return _logged(Choice(provider, place))
    refused: list[tuple[str, str]] = []
    for provider in PROVIDERS.values():
        why = provider.lacking(place)
        if not why and provider.unproven:
            why = "it has not run on hardware yet; ask for it by name to try it"
        if not why:
            return _logged(Choice(provider, place, tuple(refused)))
        refused.append((provider.name, why))
    raise NoProvider("; ".join(f"{name}: {why}" for name, why in refused))


def _logged(choice: Choice) -> Choice:
    logger.info("kv_memory provider=%s staged=%s: %s", choice.provider.name, choice.stages, choice)
    return choice

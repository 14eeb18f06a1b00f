"""`staging`: blocks are copied through a bounded buffer in shared host memory, which is the sidecar's pool.

Works with every device, and costs a copy between device and host for each hand-off, on both sides.
"""

from __future__ import annotations

from engine_adapter.memory.contract import Place, Pool
from engine_adapter.memory.shm import enter_shared
from sidecar.client import SidecarClient
from sidecar.protocol import KvLayout


class Staging:
    """See contract.MemoryProvider."""

    name = "staging"
    in_process = False
    unproven = False

    def lacking(self, place: Place) -> str:
        return place.shared_memory_fault

    def needs_shared_pool(self, place: Place) -> bool:
        return False

    def stages(self, place: Place) -> bool:
        return True

    def enter(self, client: SidecarClient, pool: Pool, layout: KvLayout) -> str:
        return enter_shared(client, pool, layout)

"""`shm`: the KV lies in shared memory, whose descriptor goes over the unix socket. Nothing is copied."""

from __future__ import annotations

from engine_adapter.memory.contract import Place, Pool
from sidecar.client import SidecarClient
from sidecar.protocol import KvLayout


class SharedMemory:
    """See contract.MemoryProvider."""

    name = "shm"
    in_process = False
    unproven = False

    def lacking(self, place: Place) -> str:
        if place.device != "cpu":
            return f"the KV lies in {place.device} memory, which no other process can map as shared memory"
        return place.shared_memory_fault or place.shared_pool_fault

    def needs_shared_pool(self, place: Place) -> bool:
        return True

    def stages(self, place: Place) -> bool:
        return False

    def enter(self, client: SidecarClient, pool: Pool, layout: KvLayout) -> str:
        return enter_shared(client, pool, layout)


def enter_shared(client: SidecarClient, pool: Pool, layout: KvLayout) -> str:
    """Hand the pool's descriptor over. Raises SidecarError."""
    assert pool.fd is not None, "the pool was not allocated as shared memory"
    return client.register_pool(pool.fd, layout, staged=pool.staged, address=pool.address)

"""`in_process`: the sidecar is a thread of the engine's process and uses the KV by its address.

For where processes can't share memory. The price: it shares the interpreter's lock with the engine, it can't be killed
alone when it hangs, and Mooncake, which runs in a process of its own, does not reach the memory. It reaches host memory
only: KV on a device is staged.
"""

from __future__ import annotations

from engine_adapter.memory.contract import Place, Pool
from sidecar.client import SidecarClient
from sidecar.protocol import KvLayout, PoolMemory


class InProcess:
    """See contract.MemoryProvider."""

    name = "in_process"
    in_process = True
    unproven = False

    def lacking(self, place: Place) -> str:
        if not place.own_sidecar:
            return "the sidecar would be a thread of the engine, and a running one was named; leave sidecar at auto"
        if place.transport in ("mooncake", "shm"):
            return f"transport {place.transport} needs memory that another process can map; use tcp or auto"
        return ""

    def needs_shared_pool(self, place: Place) -> bool:
        return False

    def stages(self, place: Place) -> bool:
        return place.device != "cpu"

    def enter(self, client: SidecarClient, pool: Pool, layout: KvLayout) -> str:
        memory = PoolMemory("address", pool.address, num_bytes=pool.num_bytes)
        return client.register_memory(memory, layout, staged=pool.staged)

"""`device_ipc`: the sidecar opens the device memory itself, by a key that the driver gives for it.

CUDA: cudaIpcGetMemHandle. NPU: aclrtIpcMemGetExportKey. Neither has run on hardware yet: it was written from the
vendors' manuals and is tested against libraries that stand in for theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine_adapter.memory.contract import Place, Pool
from engine_adapter.memory.device_keys import NoKey, export_key
from sidecar.client import SidecarClient
from sidecar.errors import LayoutRefused
from sidecar.protocol import KvLayout, PoolMemory

ALLOCATOR_VARIABLES = {
    "cuda": ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    "npu": ("PYTORCH_NPU_ALLOC_CONF",),
}
"""Where torch's allocators read their options."""


class DeviceIpc:
    """See contract.MemoryProvider."""

    name = "device_ipc"
    in_process = False
    unproven = True

    def lacking(self, place: Place) -> str:
        if place.device == "cpu":
            return "the KV lies in host memory"
        if variable := expandable_segments(place.device, place.environment):
            return (
                f"expandable segments are on ({variable}), and their memory has no IPC key; "
                f"set {variable}=expandable_segments:False"
            )
        if place.transport in ("mooncake", "shm"):
            return f"transport {place.transport} does not take imported device memory yet; use tcp or auto"
        return ""

    def needs_shared_pool(self, place: Place) -> bool:
        return False

    def stages(self, place: Place) -> bool:
        return False

    def enter(self, client: SidecarClient, pool: Pool, layout: KvLayout) -> str:
        try:
            key, offset = export_key(pool.device, pool.address, pool.num_bytes)
        except NoKey as error:
            raise LayoutRefused(f"no IPC key for the KV: {error}; use another memory provider") from error
        memory = PoolMemory(f"{pool.device}_ipc", 0, key, offset, pool.num_bytes, pool.device_index)
        return client.register_memory(memory, layout)


def expandable_segments(device: str, environment: Mapping[str, str]) -> str:
    """The variable that turns them on; "" where they are off, as they are by default."""
    for variable in ALLOCATOR_VARIABLES.get(device, ()):
        for option in environment.get(variable, "").split(","):
            name, _, value = option.partition(":")
            if name.strip() == "expandable_segments" and value.strip().lower() == "true":
                return variable
    return ""

"""What one worker registers with its sidecar, by the memory provider that works for its KV cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine_adapter.device import BlockCopies
from engine_adapter.memory.buffer import NoBuffer, StagingBuffer, shared_memory_fault
from engine_adapter.memory.choice import Choice, NoProvider, choose
from engine_adapter.memory.contract import Place, Pool
from engine_adapter.memory.slots import runs
from engine_adapter.memory.staged_link import StagedLink
from engine_adapter.sidecar_link import SidecarLink
from engine_adapter.vllm_connector.metadata import StageOrder
from engine_adapter.vllm_connector.pool import byte_planes, positions, share, share_fault, slot_planes
from engine_adapter.vllm_connector.settings import ConnectorSettings, ConnectorStartError
from engine_adapter.vllm_connector.staged_offers import split_slots
from sidecar.client import SidecarClient
from sidecar.protocol import KvLayout

LayoutOf = Callable[[Mapping[int, int]], KvLayout]
"""The layout, given where each storage begins in the pool."""


class KvMemory:
    """The KV cache itself in shared memory or by its address, or a staging buffer."""

    def __init__(self, settings: ConnectorSettings, kv_role: str, tensors: Sequence[Any], layout_of: LayoutOf) -> None:
        """Raises ConnectorStartError."""
        self._kv_role = kv_role
        self.choice = _choose(settings, tensors)
        self._copies: BlockCopies | None = None
        if self.choice.stages:
            self.layout, self.pool = self._staged(settings, tensors, layout_of)
        elif self.choice.needs_shared_pool:
            shared = share(tensors)
            self.layout = layout_of(shared.position)
            self.pool = Pool(0, shared.num_bytes, shared.fd)
        else:
            self.layout, self.pool = _as_it_lies(tensors, layout_of, self.choice)

    def enter(self, client: SidecarClient) -> str:
        """Register with the sidecar. Returns the epoch. Raises SidecarError."""
        return self.choice.provider.enter(client, self.pool, self.layout)

    def link_of(self, link: SidecarLink) -> SidecarLink | StagedLink:
        """`link` itself, or what brings its pulls through the buffer."""
        if self._copies is None:
            return link
        return StagedLink(link, split_slots(self.layout.num_blocks, self._kv_role)[1], self._copies)

    def stage(self, orders: Sequence[StageOrder]) -> None:
        """Copy the blocks out; they lie in their slots when this returns."""
        if self._copies is not None:
            for order in orders:
                self._copies.out(runs(order.block_ids, order.slots))

    def _staged(
        self, settings: ConnectorSettings, tensors: Sequence[Any], layout_of: LayoutOf
    ) -> tuple[KvLayout, Pool]:
        position = positions(tensors)
        whole = layout_of(position)
        num_slots = min(whole.num_blocks, settings.staging_bytes // whole.block_bytes)
        if num_slots < 2:
            raise ConnectorStartError(
                f"kv_connector_extra_config.staging_bytes {settings.staging_bytes} holds {num_slots} blocks of "
                f"{whole.block_bytes} bytes; give room for all blocks of the longest prompt, twice with kv_both"
            )
        try:
            buffer = StagingBuffer(whole, num_slots, shared=not self.choice.provider.in_process)
        except NoBuffer as error:
            raise ConnectorStartError(f"{error}; see kv_connector_extra_config.staging_bytes") from error
        kv = byte_planes(tensors, position, whole.planes, whole.num_blocks)
        slots = slot_planes(buffer.memory, buffer.layout.planes, num_slots)
        self._copies = BlockCopies(self.choice.place.device, kv, slots)
        return buffer.layout, buffer.pool


def _choose(settings: ConnectorSettings, tensors: Sequence[Any]) -> Choice:
    devices = sorted({str(tensor.device.type) for tensor in tensors})
    if len(devices) != 1 or devices[0] not in ("cpu", "cuda", "npu"):
        raise ConnectorStartError(
            f"the KV cache lies on {', '.join(devices)}: BatonConnector knows cpu, cuda and npu, one at a time"
        )
    place = Place(
        devices[0],  # type: ignore[arg-type]
        settings.sidecar == "auto",
        shared_memory_fault(),
        os.environ,
        settings.transport,
        share_fault(tensors),
    )
    try:
        return choose(settings.memory, place)
    except NoProvider as error:
        raise ConnectorStartError(
            f"kv_connector_extra_config.memory {settings.memory}: {error.reason}; or leave it at auto"
        ) from error


def _as_it_lies(tensors: Sequence[Any], layout_of: LayoutOf, choice: Choice) -> tuple[KvLayout, Pool]:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    if len(storages) != 1:
        raise ConnectorStartError(
            f"the KV cache lies in {len(storages)} pieces of memory, and this provider takes one; "
            "use kv_connector_extra_config.memory staging"
        )
    [(address, storage)] = storages.items()
    index = tensors[0].device.index or 0
    return layout_of({address: 0}), Pool(address, storage.nbytes(), None, choice.place.device, index)

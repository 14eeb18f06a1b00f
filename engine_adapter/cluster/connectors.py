"""What a plan must know of each KV connector: its contract, whom it can join, which ports it takes, what it is told.

Facts: vLLM's and vllm-ascend's sources as the KV contracts' notes have them (ports, ranks, parallel sizes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PortUse = Literal["group", "rank", "instance", "llmdatadist", "sidecar", "none"]


@dataclass(frozen=True, slots=True)
class ConnectorFacts:
    contract: str
    """What `pd-proxy --contract` is told."""
    ports: PortUse
    """What is bound from kv_port on. group: dp * tp * pp ports, each rank its own, over all nodes of an instance.
    rank: one a data-parallel rank. instance: one. llmdatadist: by its own variable, not by kv_port.
    sidecar: tp a process."""
    decode_tp: Literal["divides", "either", "any"] = "any"
    """divides: prefill tp is a multiple of decode tp. either: one is a multiple of the other."""
    decode_pp: bool = True
    """Whether the decoder may have pipeline stages."""
    prefill_pp: bool = True
    sizes_in_config: bool = False
    """Both sides are told dp and tp of both sides: all instances of a role are alike."""
    ascend_transfer: bool = False
    """Mooncake moves the KV of NPUs: ADXL's ports are taken."""
    rank_table: bool = False
    external_dp: bool = True
    unlike_hardware: bool = True
    """Whether prefillers and decoders may be of unlike hardware."""


_MOONCAKE = ConnectorFacts(
    contract="pull",
    ports="group",
    decode_tp="divides",
    decode_pp=False,
    sizes_in_config=True,
    ascend_transfer=True,
    unlike_hardware=False,
)

FACTS: dict[tuple[str, str], ConnectorFacts] = {
    ("vllm-ascend", "MooncakeConnectorV1"): _MOONCAKE,
    ("vllm-ascend", "MooncakeConnector"): _MOONCAKE,
    ("vllm-ascend", "MooncakeLayerwiseConnector"): ConnectorFacts(
        contract="layerwise",
        ports="group",
        decode_tp="divides",
        decode_pp=False,
        sizes_in_config=True,
        ascend_transfer=True,
        unlike_hardware=False,
    ),
    ("vllm-ascend", "LLMDataDistCMgrConnector"): ConnectorFacts(
        contract="pull",
        ports="llmdatadist",
        decode_tp="divides",
        decode_pp=False,
        prefill_pp=False,
        rank_table=True,
        unlike_hardware=False,
    ),
    ("vllm", "NixlConnector"): ConnectorFacts(contract="pull", ports="rank", decode_tp="either"),
    ("vllm", "MooncakeConnector"): ConnectorFacts(
        contract="mooncake", ports="instance", decode_tp="either", external_dp=False
    ),
    **{
        (engine, "BatonConnector"): ConnectorFacts(
            contract="pull",
            ports="sidecar",
            decode_tp="either",
            decode_pp=False,
            prefill_pp=False,
            ascend_transfer=engine == "vllm-ascend",
        )
        for engine in ("vllm-ascend", "vllm", "torch")
    },
}

MOONCAKE_PORTS = range(15000, 17001)
"""Every transfer engine takes ports there at random (MC_MIN_RPC_PORT, MC_MAX_RPC_PORT)."""

ADXL_BASE_PORT = 20000
ADXL_PORTS_PER_CHIP = 1000


def adxl_ports(num_chips: int) -> range:
    """Where ADXL listens on a node with so many chips: 20000 + physical id * 1000 and on (ASCEND_BASE_PORT)."""
    return range(ADXL_BASE_PORT, ADXL_BASE_PORT + num_chips * ADXL_PORTS_PER_CHIP)

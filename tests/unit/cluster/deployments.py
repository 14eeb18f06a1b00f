"""The deployments of the repository, and made-up ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from engine_adapter.cluster.deployment import Deployment

DIRECTORY = Path(__file__).parents[3] / "configs" / "deployments"
FILES = sorted(DIRECTORY.glob("*.toml"))
NAMES = [path.stem for path in FILES]

SMALL = """
name = "small"
node = [{ address = "10.0.0.1" }, { address = "10.0.0.2" }]
model = { path = "/m", served_name = "m" }
engine = { kind = "vllm-ascend", engine_version = "0.11.0" }
connector = { name = "MooncakeConnectorV1" }
proxy = { node = "10.0.0.1", port = 8000 }

[prefill]
tp = 2

[decode]
tp = 2

[[instance]]
role = "prefill"
nodes = ["10.0.0.1"]

[[instance]]
role = "decode"
nodes = ["10.0.0.2"]
"""

KINDS = {
    "vllm-ascend": ("MooncakeConnectorV1", "MooncakeLayerwiseConnector", "LLMDataDistCMgrConnector", "BatonConnector"),
    "vllm": ("NixlConnector", "MooncakeConnector", "BatonConnector"),
    "torch": ("BatonConnector",),
}
VERSIONS = {"vllm-ascend": "0.11.0", "vllm": "0.23.0", "torch": "0.1.0"}


@st.composite
def made_up(draw: st.DrawFn) -> Deployment:
    """Any number of instances of any size on enough nodes; not all of them can be: the rules say which."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    hardware = draw(st.sampled_from(["A2", "A3"] if kind == "vllm-ascend" else ["gpu", "cpu"]))
    num_nodes = draw(st.integers(1, 4))
    addresses = [f"10.0.0.{i}" for i in range(1, num_nodes + 1)]
    node = [{"address": it, "hardware": hardware, "devices": draw(st.sampled_from([8, 16]))} for it in addresses]
    roles, instances = {}, []
    for role in ("prefill", "decode"):
        nodes_each = 1 if kind == "torch" else draw(st.integers(1, min(2, num_nodes)))
        dp = 1 if kind == "torch" else nodes_each * draw(st.sampled_from([1, 1, 2, 4]))
        tp = 1 if kind == "torch" else draw(st.sampled_from([2, 4] if role == "prefill" else [1, 2]))
        roles[role] = {"dp": dp, "tp": tp, "dp_mode": draw(st.sampled_from(["external", "internal"]))}
        for _ in range(draw(st.integers(1, 2))):
            first = draw(st.integers(0, num_nodes - nodes_each))
            spec: dict[str, Any] = {"role": role, "nodes": addresses[first : first + nodes_each]}
            spec |= {"count": draw(st.integers(1, 2))}
            if hardware != "cpu" and draw(st.booleans()):
                first_device = draw(st.integers(0, 4))
                num_devices = spec["count"] * max(1, dp // nodes_each) * tp
                spec["devices"] = list(range(first_device, first_device + num_devices))
            spec |= draw(st.sampled_from([{}, {}, {"port": 9000}, {"kv_port": 40000}, {"dp_rpc_port": 13000}]))
            instances.append(spec)
    said: dict[str, Any] = {
        "name": "made-up",
        "node": node,
        "model": {"path": "/m"},
        "engine": {"kind": kind, "engine_version": VERSIONS[kind]},
        "connector": {"name": draw(st.sampled_from(KINDS[kind]))},
        **roles,
        "instance": instances,
        "proxy": {"node": addresses[0], "port": draw(st.sampled_from([8000, 13700]))},
    }
    if kind != "torch" and draw(st.booleans()):
        said["store"] = {"kind": "ucm", "directory": "/shared"}
        said["mooncake_master"] = {"node": addresses[-1]}
    return Deployment.model_validate(said)

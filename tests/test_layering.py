"""The house's import rules, held by reading every file (design: "The house").

Who may import whom, which libraries stand behind which wall, what may be imported late, and that pure files stay pure.
"""

from __future__ import annotations

import ast
import importlib.metadata
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("proxy", "sidecar", "engine_adapter")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400

ALLOWED_OURS = {
    "proxy": ("proxy",),
    "sidecar": ("sidecar",),
    "engine_adapter": ("engine_adapter", "sidecar.client", "sidecar.protocol", "sidecar.errors"),
}
WALLS = {
    "torch": (
        "engine_adapter/torch_engine/",
        "engine_adapter/vllm_connector/layout.py",
        "engine_adapter/vllm_connector/pool.py",
        "engine_adapter/device.py",
    ),
    "torch_npu": ("engine_adapter/device.py",),
    "mooncake": ("sidecar/transport/mooncake.py", "sidecar/store/mooncake_process.py"),
    "vllm": ("engine_adapter/vllm_connector/compat.py", "engine_adapter/vllm_connector/plugin.py"),
    "prometheus_client": ("metrics.py",),
}
LAZY = {"torch", "torch_npu", "mooncake"}
IO_MODULES = {
    "aiohttp", "asyncio", "mmap", "multiprocessing", "select", "selectors", "signal", "socket", "subprocess",
    "threading", "time", "uvloop",
}  # fmt: skip
PURE = {
    "engine_adapter/cluster/addresses.py",
    "engine_adapter/cluster/allocation.py",
    "engine_adapter/cluster/connectors.py",
    "engine_adapter/cluster/deployment.py",
    "engine_adapter/cluster/deployment_files.py",
    "engine_adapter/cluster/deployment_plan.py",
    "engine_adapter/cluster/dp_templates.py",
    "engine_adapter/cluster/engine_commands.py",
    "engine_adapter/cluster/host_findings.py",
    "engine_adapter/cluster/kv_config.py",
    "engine_adapter/cluster/node_findings.py",
    "engine_adapter/cluster/node_probes.py",
    "engine_adapter/cluster/parallel_rules.py",
    "engine_adapter/cluster/plan.py",
    "engine_adapter/cluster/plan_output.py",
    "engine_adapter/cluster/processes.py",
    "engine_adapter/cluster/rank_table.py",
    "engine_adapter/cluster/seed_checks.py",
    "engine_adapter/cluster/rehearsal.py",
    "engine_adapter/cluster/share.py",
    "engine_adapter/cluster/shell_script.py",
    "engine_adapter/cluster/shell_words.py",
    "engine_adapter/cluster/topology.py",
    "engine_adapter/cluster/version_rules.py",
    "engine_adapter/cluster/versions.py",
    "engine_adapter/kv_transfer_params.py",
    "engine_adapter/mark_pace.py",
    "engine_adapter/memory/slots.py",
    "engine_adapter/push_params.py",
    "engine_adapter/torch_engine/block_manager.py",
    "engine_adapter/torch_engine/detokenizer.py",
    "engine_adapter/torch_engine/content_parts.py",
    "engine_adapter/torch_engine/media_addresses.py",
    "engine_adapter/torch_engine/prompt_images.py",
    "engine_adapter/torch_engine/scheduler.py",
    "engine_adapter/torch_engine/sequence.py",
    "proxy/contracts/layerwise.py",
    "proxy/contracts/mooncake.py",
    "engine_adapter/vllm_connector/block_tables.py",
    "engine_adapter/vllm_connector/content_names.py",
    "engine_adapter/vllm_connector/layout.py",
    "engine_adapter/vllm_connector/settings.py",
    "engine_adapter/vllm_connector/store_settings.py",
    "proxy/chunked_body.py",
    "proxy/client_pace.py",
    "proxy/client_stream.py",
    "proxy/continuation.py",
    "proxy/contracts/order.py",
    "proxy/contracts/p2p_nccl.py",
    "proxy/contracts/pair.py",
    "proxy/contracts/pull.py",
    "proxy/contracts/sglang.py",
    "proxy/contracts/unanswered.py",
    "proxy/errors.py",
    "proxy/fair_queue.py",
    "proxy/health.py",
    "proxy/image_parts.py",
    "proxy/instance_state.py",
    "proxy/route_memory.py",
    "proxy/http1.py",
    "proxy/joining.py",
    "proxy/kv_ledger.py",
    "proxy/load_ledger.py",
    "proxy/metric_families.py",
    "proxy/openai_api.py",
    "proxy/prompt_facts.py",
    "proxy/request_fields.py",
    "proxy/retry.py",
    "proxy/scheduling/ascend.py",
    "proxy/scheduling/candidate.py",
    "proxy/scheduling/cost.py",
    "proxy/scheduling/least_load.py",
    "proxy/scheduling/policy.py",
    "proxy/scheduling/power_of_two.py",
    "proxy/scheduling/prefix_affinity.py",
    "proxy/scheduling/random_choice.py",
    "proxy/scheduling/round_robin.py",
    "proxy/scheduling/session.py",
    "proxy/sse.py",
    "proxy/workers/frames.py",
    "proxy/workers/instances_sum.py",
    "proxy/workers/metrics_sum.py",
    "proxy/strict_head.py",
    "sidecar/errors.py",
    "sidecar/framing.py",
    "sidecar/layout.py",
    "sidecar/leases.py",
    "sidecar/message.py",
    "sidecar/memory/contract.py",
    "sidecar/protocol.py",
    "sidecar/ready.py",
    "sidecar/reshard.py",
    "sidecar/spans.py",
    "sidecar/store/keys.py",
    "sidecar/store/messages.py",
    "sidecar/store/sealed_block.py",
    "sidecar/taken_ports.py",
    "sidecar/transfer.py",
}


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every imported module of a file, and whether the import stands inside a function."""
    tree = ast.parse(path.read_text())
    late = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)}  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in late) for alias in node.names]
    return found


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_to_the_house_rules(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    package = name.split("/")[0]
    broken = []
    for module, late in imports_of(path):
        root = module.split(".")[0]
        if root in PACKAGES and not any(within(module, allowed) for allowed in ALLOWED_OURS[package]):
            broken.append(f"{package} may not import {module}")
        if root in WALLS and not any(name.startswith(wall) or name.endswith("/" + wall) for wall in WALLS[root]):
            broken.append(f"{root} is walled off: only {WALLS[root]} may import it")
        if late and root not in LAZY:
            broken.append(f"{module} is imported late; only {sorted(LAZY)} may be")
        if name in PURE and root in IO_MODULES:
            broken.append(f"a pure file imports {module}")
        if name in PURE and (target := file_of(module)) and is_io(target):
            broken.append(f"a pure file imports the I/O file {module}")
    assert not broken, f"{name}: {broken}"
    assert len(path.read_text().splitlines()) < MAX_LINES, f"{name} has {MAX_LINES} lines or more"


@pytest.mark.parametrize(("one", "other"), [("torch_engine", "vllm_connector"), ("vllm_connector", "torch_engine")])
def test_an_engine_is_no_part_of_another(one: str, other: str) -> None:
    """What they share stands above them."""
    files = (path for path in FILES if path.is_relative_to(ROOT / "engine_adapter" / one))
    found = [(path.name, module) for path in files for module, _ in imports_of(path)]
    assert not [pair for pair in found if within(pair[1], f"engine_adapter.{other}")]


def file_of(module: str) -> Path | None:
    """The file of ours behind `module`, which may name something inside it."""
    candidates = (ROOT / (name.replace(".", "/") + ".py") for name in (module, module.rpartition(".")[0]) if name)
    return next((path for path in candidates if path in FILES), None)


def is_io(path: Path) -> bool:
    return any(module.split(".")[0] in IO_MODULES for module, _ in imports_of(path))


def test_pure_files_exist() -> None:
    assert not [name for name in PURE if not (ROOT / name).exists()]


def test_the_package_list_is_complete() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
    assert listed == there


@pytest.mark.parametrize("package", PACKAGES)
def test_an_import_name_is_ours(package: str) -> None:
    """PyPI knows other projects called `proxy` and `sidecar`: the names must resolve inside this distribution."""
    module = __import__(package)
    assert Path(module.__file__ or "").resolve().is_relative_to(ROOT)
    assert set(importlib.metadata.packages_distributions()[package]) == {"pd-baton"}

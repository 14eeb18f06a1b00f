"""What a node's answers mean beside its NPUs: versions, memory, network card, ports; and nodes compared. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from engine_adapter.cluster import versions
from engine_adapter.cluster.allocation import facts_of, reserved
from engine_adapter.cluster.deployment import Deployment, Node
from engine_adapter.cluster.node_findings import TLS_REMEDY, Finding, not_found, super_pod_id, tls_switches
from engine_adapter.cluster.node_probes import Answers, Said, is_npu
from engine_adapter.cluster.processes import DeploymentPlan

GIB = 1024**3
LEAST_SHM_GIB = 1
"""What the documents' `docker run --shm-size=1g` gives."""
DISTRIBUTIONS = {"vllm-ascend": "vllm-ascend", "vllm": "vllm", "torch": "pd-baton"}
COMPARED = ("vllm", "vllm-ascend", "torch", "torch-npu", "CANN", "Mooncake")


def host_findings(deployment: Deployment, plan: DeploymentPlan, node: Node, answers: Answers) -> Iterator[Finding]:
    yield from _versions(deployment, node, known_versions(answers), answers)
    yield _shared_memory(deployment, plan, node, answers)
    yield from _network_card(node, answers)
    yield from _ports(deployment, plan, node, answers)


def known_versions(answers: Answers) -> dict[str, str]:
    said = answers.get("versions")
    lines = said.text.splitlines() if said and said.status == 0 else []
    found = dict(line.split(maxsplit=1) for line in lines if len(line.split()) == 2)
    mooncake = [version for name, version in found.items() if name.startswith("mooncake-")]
    if mooncake or "mooncake" in found:
        found["Mooncake"] = mooncake[0] if mooncake else "built from its source"
    cann = answers.get("cann")
    if cann and "=" in cann.text:
        found["CANN"] = cann.text.splitlines()[0].partition("=")[2].strip(" []")
    return found


def _versions(deployment: Deployment, node: Node, found: Mapping[str, str], answers: Answers) -> Iterator[Finding]:
    engine = deployment.engine
    distribution = DISTRIBUTIONS[engine.kind]
    if not_found(answers.get("versions")) or answers["versions"].status:
        yield Finding(node.address, "versions", "unknown", "no python3 there that could say", "install it, or PATH")
        return
    needed = [distribution]
    if engine.kind == "vllm-ascend":
        needed += ["vllm", "torch-npu"]
    if facts_of(deployment).ascend_transfer or deployment.connector.name.startswith("Mooncake"):
        needed += [] if deployment.connector.name == "BatonConnector" else ["Mooncake"]
    for name in needed:
        if name not in found:
            yield Finding(node.address, name, "failed", "not installed", f"install {name} where vllm's Python is")
    told = found.get(distribution, "")
    if told:
        remedy = f"install {distribution}=={engine.engine_version}, or correct engine.engine_version"
        same = _release(told) == versions.version_of(engine.engine_version)
        said = told if same else f"{told}, the file has {engine.engine_version}"
        yield Finding(node.address, distribution, "ok" if same else "failed", said, "" if same else remedy)
    for one, other in (("vllm", "vllm-ascend"), ("torch", "torch-npu")):
        if one in found and other in found:
            alike = _release(found[one])[:2] == _release(found[other])[:2]
            said = f"{one} {found[one]}, {other} {found[other]}"
            remedy = "" if alike else f"install the {one} that {other} was made for"
            yield Finding(node.address, f"{one} of {other}", "ok" if alike else "failed", said, remedy)
    if is_npu(node) and engine.kind == "vllm-ascend":
        cann, remedy = found.get("CANN", ""), "install CANN, or set ASCEND_HOME_PATH"
        yield Finding(node.address, "CANN", "ok" if cann else "unknown", cann or "not found", "" if cann else remedy)
    if "Mooncake" in found:
        yield Finding(node.address, "Mooncake", "ok", found["Mooncake"])


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _shared_memory(deployment: Deployment, plan: DeploymentPlan, node: Node, answers: Answers) -> Finding:
    store = deployment.store
    prefilling = sum(1 for it in plan.of_node(node.address) if it.role == "prefill" and it.kind == "engine")
    needed = max(LEAST_SHM_GIB, store.cache_buffer_gb * prefilling if store else 0)
    said = answers.get("shm")
    words = said.text.splitlines()[-1].split() if said and not said.status and said.text else []
    if len(words) < 4 or not words[1].isdigit():
        return Finding(node.address, "shared memory", "unknown", "df /dev/shm says nothing", "is /dev/shm mounted?")
    size = int(words[1]) * 1024 / GIB
    text = f"{size:.1f} GiB of /dev/shm, {needed} GiB needed"
    if size < needed * 0.99:
        remedy = f"docker run --shm-size={needed}g, or mount -o remount,size={needed}g /dev/shm"
        return Finding(node.address, "shared memory", "failed", text, remedy)
    return Finding(node.address, "shared memory", "ok", text)


def _network_card(node: Node, answers: Answers) -> Iterator[Finding]:
    nics = answers.get("nics", Said(1, "")).text.split()
    if nics and node.nic not in nics:
        there = ", ".join(nics)
        yield Finding(node.address, "nic", "failed", f"{node.nic} is not there, but {there}", "correct node.nic")
        return
    said = answers.get("nic")
    has_address = re.search(r"[0-9a-f:]", node.address) and not re.search(r"[g-z]", node.address, re.I)
    if said is None or said.status or not has_address:
        status = "ok" if nics else "unknown"
        yield Finding(
            node.address, "nic", "ok" if nics else "unknown", node.nic, "" if status == "ok" else "install ip"
        )
    elif not re.search(rf"\b{re.escape(node.address)}/", said.text):
        found = ", ".join(re.findall(r"inet6? (\S+)/", said.text)) or "no address"
        text = f"{node.nic} has {found}, not {node.address}"
        yield Finding(node.address, "nic", "failed", text, "correct node.nic or node.address; in Docker: --net=host")
    else:
        yield Finding(node.address, "nic", "ok", f"{node.nic} has {node.address}")


def _ports(deployment: Deployment, plan: DeploymentPlan, node: Node, answers: Answers) -> Iterator[Finding]:
    planned = {port: f"{it.name}'s {what}" for it in plan.of_node(node.address) for port, what in it.ports}
    if not planned:
        return
    said = answers.get("listening")
    taken = {int(word.rpartition(":")[2], 16) for word in said.text.split()} if said else set()
    busy = [f"{port} ({planned[port]})" for port in sorted(planned) if port in taken]
    clash = [f"{port}: {why}" for port in sorted(planned) if (why := reserved(deployment, node.address, port))]
    if said is None:
        yield Finding(node.address, "ports", "unknown", "/proc/net/tcp can't be read", "")
    elif busy:
        text = f"listened on already: {', '.join(busy)}"
        yield Finding(node.address, "ports", "failed", text, "stop what listens there (ss -ltnp), or give others")
    elif clash:
        yield Finding(node.address, "ports", "failed", "; ".join(clash), "give others")
    else:
        yield Finding(node.address, "ports", "ok", f"{len(planned)} free: {spans(planned)}")
    yield from _ephemeral(node, planned, answers)


def _ephemeral(node: Node, planned: Iterable[int], answers: Answers) -> Iterator[Finding]:
    """Ports that an outgoing connection may have when an engine comes to listen there."""
    bounds = answers.get("ephemeral", Said(1, "")).text.split()
    if len(bounds) != 2:
        return
    kept = _ranges(answers.get("reserved", Said(1, "")).text)
    first, last = map(int, bounds)
    inside = [port for port in planned if first <= port <= last and not any(port in span for span in kept)]
    if inside:
        text = f"{spans(inside)} are among those of outgoing connections ({first}-{last})"
        remedy = f"sysctl net.ipv4.ip_local_reserved_ports={spans(inside).replace(' ', '')}"
        yield Finding(node.address, "ephemeral ports", "warning", text, remedy)


def _ranges(text: str) -> list[range]:
    parts = [part.split("-") for part in text.strip().split(",") if part]
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def spans(ports: Iterable[int]) -> str:
    """`1-3, 7`"""
    found: list[list[int]] = []
    for port in sorted(ports):
        if found and port == found[-1][1] + 1:
            found[-1][1] = port
        else:
            found.append([port, port])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def compared(deployment: Deployment, answers: Mapping[str, Answers]) -> Iterator[Finding]:
    """What has to be alike on all nodes that were looked at."""
    nodes = [node for node in deployment.node if node.address in answers]
    if len(nodes) < 2:
        return
    npus = [node for node in nodes if is_npu(node)]
    switches = {node.address: ", ".join(tls_switches(node, answers[node.address])) for node in npus}
    yield from _alike("tls", switches, TLS_REMEDY)
    pods = {node.address: super_pod_id(answers[node.address]) for node in npus if node.hardware == "A3"}
    yield from _alike("super pod", pods, "hccs reaches within one super pod only: choose nodes of one")
    for name in COMPARED:
        told = {node.address: known_versions(answers[node.address]).get(name, "") for node in nodes}
        yield from _alike(name, told, "install the same on all nodes")


def _alike(check: str, by_node: Mapping[str, str], remedy: str) -> Iterator[Finding]:
    said = {node: value for node, value in by_node.items() if value}
    values = set(said.values())
    if len(said) < 2:
        return
    if len(values) == 1:
        yield Finding("all", check, "ok", f"{values.pop()} on {len(said)} nodes")
    else:
        text = ", ".join(f"{value} on {node}" for node, value in said.items())
        yield Finding("all", check, "failed", text, remedy)

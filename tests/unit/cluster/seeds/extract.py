"""Extracts what the seed documents start: runs their own scripts with stand-ins that record argv and environment.

    python tests/unit/cluster/seeds/extract.py DIRECTORY_OF_THE_SEEDS

writes one JSON file a deployment beside itself. The documents are not part of the repository; these facts are. Only
what a document leaves as a placeholder for its reader ("xxxx") is filled in here, as the document's text says.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUTER = {
    "HOME": "/root",
    "LD_LIBRARY_PATH": "/outer/lib",
    "PYTHONPATH": "/outer/python",
    "ftp_proxy": "outer",
    "http_proxy": "outer",
    "https_proxy": "outer",
}
"""The environment a seed's script is started in: what it keeps, extends or unsets shows."""

IGNORED = {"PWD", "OLDPWD", "SHLVL", "_", "PATH", "RECORDS", "LC_CTYPE"}

RECORDER = """#!{python} -I
import json, os, sys
path = os.path.join(os.environ["RECORDS"], str(os.getpid()) + ".json")
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(path, "w") as file:
    json.dump({{"argv": argv, "env": dict(os.environ)}}, file)
"""

Facts = dict[str, Any]


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, body) of every fenced block. One that is never closed ends where the next tab begins."""
    found: list[tuple[str, str]] = []
    lines: list[str] | None = None
    language = ""
    for line in text.splitlines():
        fence = re.match(r"\s*```(.*)", line)
        if lines is None and fence:
            lines, language = [], fence[1].strip()
        elif lines is not None and (fence or line.startswith("::::")):
            found.append((language, "\n".join(lines)))
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def bodies(text: str, having: str) -> list[str]:
    return [body for _, body in blocks(text) if having in body]


def ran(command: list[str], files: dict[str, str]) -> list[Facts]:
    """What a command starts, in a directory with these files."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "bin").mkdir()
        (place / "records").mkdir()
        for tool in ("vllm", "mooncake_master"):
            (place / "bin" / tool).write_text(RECORDER.format(python=sys.executable))
            (place / "bin" / tool).chmod(0o755)
        for path, text in files.items():
            (place / path).write_text(text)
        env = {**OUTER, "PATH": f"{place}/bin:/usr/bin:/bin", "RECORDS": str(place / "records")}
        subprocess.run(command, cwd=place, env=env, check=True, capture_output=True, timeout=60)
        records = [json.loads(path.read_text()) for path in (place / "records").iterdir()]
    return [facts_of(record["argv"], record["env"]) for record in records]


def facts_of(argv: list[str], env: dict[str, str]) -> Facts:
    """The environment as what differs from the one outside."""
    return {
        "argv": argv,
        "env": {key: env[key] for key in sorted(env) if key not in IGNORED and env[key] != OUTER.get(key)},
        "unset": sorted(key for key in OUTER if key not in env),
    }


def ran_script(body: str) -> Facts:
    (facts,) = ran(["bash", "script.sh"], {"script.sh": body})
    return facts


def value(facts: Facts, flag: str) -> str:
    argv: list[str] = facts["argv"]
    return argv[argv.index(flag) + 1]


def words(body: str) -> list[str]:
    return shlex.split(body.replace("\\\n", " ").rstrip().rstrip("\\"))


def proxy_of(text: str, index: int = 0) -> list[str]:
    return words(list(_proxies(text))[index])


def _proxies(text: str) -> Iterator[str]:
    for body in bodies(text, "proxy"):
        lines = body.replace("\\\n", " ").splitlines()
        yield from (line for line in lines if re.match(r"python \S*proxy\S*\.py", line))


def request_of(text: str) -> list[str]:
    (body,) = bodies(text, "curl http")
    return words(body)


def checks_of(text: str) -> list[str]:
    """The look at a node's NPU network, a line each, without pings to addresses only the reader knows."""
    lines = [line for body in (*bodies(text, "hccn"), *bodies(text, "spod-info")) for line in body.splitlines()]
    wanted = re.compile(r"\s*(for i in .*(hccn_tool|npu-smi)|cat /etc/hccn.conf)")
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if wanted.match(line) and "x.x.x.x" not in line))


def seed_000(text: str) -> dict[str, Facts]:
    prefill, decode = (ran_script(body) for body in bodies(text, "vllm serve"))
    processes = {"prefill-0": prefill, "decode-0": decode}
    common = {"proxy": proxy_of(text), "request": request_of(text), "checks": checks_of(text)}
    return {"qwen2.5-vl-1p1d": {"processes": processes, **common}}


def seed_001(text: str) -> dict[str, Facts]:
    names = ("prefill-0-node0", "prefill-0-node1", "decode-0-node0", "decode-0-node1")
    processes = dict(zip(names, map(ran_script, bodies(text, "vllm serve")), strict=True))
    (bench,) = bodies(text, "benchmark_serving")
    (ranks,) = bodies(text, "gen_ranktable.sh")
    return {
        "deepseek-r1-2p2d-llmdatadist": {
            "processes": processes,
            "proxy": proxy_of(text),
            "request": request_of(text),
            "bench": words(bench.split("\n", 1)[1]),
            "ranktable": words(ranks.split("\n", 1)[1]),
        }
    }


def seed_002(text: str) -> dict[str, Facts]:
    names = ("prefill-0", "decode-0", "decode-1")
    processes = dict(zip(names, map(ran_script, bodies(text, "vllm serve")), strict=True))
    return {
        "qwen3-30b-1p2d-llmdatadist": {
            "processes": processes,
            "proxy": proxy_of(text),
            "request": request_of(text),
            "checks": checks_of(text),
        }
    }


def seed_003(text: str) -> dict[str, Facts]:
    deployment, rest = text.split("## Example Proxy for Deployment")
    layerwise, pull = deployment.split("### Non-layerwise")
    a3 = text.split("::::{tab-item} A3")[1].split("::::{tab-item} A2")[0]
    common = {"request": request_of(text), "bench": words(bodies(rest, "ais_bench --models")[0])}
    common["checks"] = checks_of(a3)
    (model,) = bodies(rest, "VLLMCustomAPIChatStream")
    common["bench_model"] = _python_fields(model)
    facts = {
        "deepseek-v3.1-2p1d-layerwise": {"processes": _launched(layerwise), "proxy": proxy_of(rest, 0), **common},
        "deepseek-v3.1-2p1d-mooncake": {"processes": _launched(pull), "proxy": proxy_of(rest, 1), **common},
    }
    return {**facts, "deepseek-v3.1-4p4d-llmdatadist": {"roles": _recommended(rest)}}


def _launched(text: str) -> dict[str, Facts]:
    """launch_online_dp.py with each node's template, as the start list has it. It has no line for the last node: the
    third line is taken for that, with the ranks that are left, and `listed` is false.
    """
    (launch,) = bodies(text, "multiprocessing")
    templates = bodies(text, "vllm serve")
    (listed,) = bodies(text, "python launch_online_dp.py")
    commands = [words(line)[1:] for line in listed.splitlines()]
    last = [*commands[2]]
    last[last.index("--dp-rank-start") + 1] = "16"
    processes: dict[str, Facts] = {}
    for index, (template, command) in enumerate(zip(templates, [*commands, last], strict=True)):
        files = {"launch_online_dp.py": launch, "run_dp_template.sh": template}
        name = ("prefill-0", "prefill-1", "decode-0", "decode-0")[index]
        for facts in ran([sys.executable, *command], files):
            processes[f"{name}-dp{value(facts, '--data-parallel-rank')}"] = {**facts, "listed": index < 3}
    return dict(sorted(processes.items()))


def _recommended(text: str) -> dict[str, Facts]:
    """Fragments of commands: each role's environment and flags as far as the document says them."""
    roles: dict[str, Facts] = {}
    table = dict(re.findall(r"^\| (prefill|decode) +\|(.*)\|$", text, re.MULTILINE))
    flags = ("max-model-len", "max-num-batched-tokens", "max-num-seqs", "gpu-memory-utilization")
    for role, part in zip(("prefill", "decode"), re.split(r"- \*\*decoder node\*\*", text), strict=True):
        part = part.split("- **prefiller node**")[-1].split("### Parameters Description")[0]
        dp, tp, _, *numbers = (cell.strip() for cell in table[role].split("|"))
        argv = ["vllm", "serve", "--data-parallel-size", dp, "--tensor-parallel-size", tp]
        argv += [word for flag, number in zip(flags, numbers, strict=True) for word in (f"--{flag}", number)]
        for body in (*bodies(part, "--kv-transfer-config"), *bodies(part, "--additional-config")):
            argv += words(body.replace("--kv-transfer-config\n", "--kv-transfer-config \\\n"))
        argv += words(bodies(text, "--speculative-config")[0])
        argv += re.findall(r"add '(--enforce-eager)'", part)
        roles[role] = {"argv": argv, "env": dict(re.findall(r"set (HCCL_BUFFSIZE)=(\d+)", part)), "unset": []}
    return roles


def _python_fields(body: str) -> dict[str, str]:
    """The fields of ais_bench's model file that a deployment decides."""
    return dict(
        re.findall(r"^\s+(path|model|host_ip|host_port|request_rate|batch_size)\s*=\s*\"?([^\",\n]+)", body, re.M)
    )


def seed_004(text: str) -> dict[str, Facts]:
    moe, dense = text.split("## PD Disaggregation for Dense Models")
    return {"qwen3-235b-ucm-mooncake": _ucm(moe, _moe(moe)), "qwq-32b-ucm-mooncake": _ucm(dense, _dense(dense))}


def _ucm(text: str, processes: dict[str, Facts]) -> Facts:
    (mooncake,) = bodies(text, '"metadata_server"')
    (ucm,) = bodies(text, "ucm_connector_name")
    (bench,) = bodies(text, "vllm bench serve")
    (master,) = bodies(text, "mooncake_master")
    return {
        "processes": {"mooncake_master": ran_script(master), **processes},
        "proxy": proxy_of(text),
        "bench": words(bench),
        "files": {"mooncake.json": mooncake + "\n", "ucm_config_example.yaml": ucm + "\n"},
    }


def _moe(text: str) -> dict[str, Facts]:
    (run,) = bodies(text, "# run_multi_dp.sh")
    scripts = {"prefill": bodies(text, "# prefill.sh")[0], "decode": bodies(text, "# decode.sh")[0]}
    processes: dict[str, Facts] = {}
    for node in range(1, 5):
        role, master = ("prefill", "192.168.10.1") if node < 3 else ("decode", "192.168.10.3")
        filled = run.replace('local_ip="xxxx"', f'local_ip="192.168.10.{node}"').replace(
            'nic_name="xxxx"', 'nic_name="eth0"'
        )
        filled = filled.replace("dp_rank_start=xxxx", f"dp_rank_start={0 if node % 2 else 2}")
        filled = filled.replace('dp_address="xxxx"', f'dp_address="{master}"').replace("./prefill.sh", f"./{role}.sh")
        for facts in ran(["bash", "run.sh"], {"run.sh": filled, f"{role}.sh": scripts[role]}):
            processes[f"{role}-0-dp{value(facts, '--data-parallel-rank')}"] = facts
    return dict(sorted(processes.items()))


def _dense(text: str) -> dict[str, Facts]:
    """Each script is to be run twice on its node, with other ports."""
    scripts = dict(zip(("prefill", "decode"), bodies(text, "vllm serve"), strict=True))
    processes = {}
    for role, script in scripts.items():
        processes[f"{role}-0"] = ran_script(script)
        other = script.replace("server_port=9000", "server_port=9001").replace(
            "mooncake_port=20001", "mooncake_port=20002"
        )
        processes[f"{role}-1"] = ran_script(other)
    return processes


SEEDS = {"000": seed_000, "001": seed_001, "002": seed_002, "003": seed_003, "004": seed_004}


def extracted(directory: Path) -> dict[str, Facts]:
    found: dict[str, Facts] = {}
    for number, extract in SEEDS.items():
        (path,) = directory.glob(f"{number}_*.txt")
        found |= {name: {"seed": number, **facts} for name, facts in extract(path.read_text()).items()}
    return found


def lines_of(facts: Facts) -> str:
    """JSON with a process a line."""
    parts = []
    for key, said in sorted(facts.items()):
        if isinstance(said, dict):
            inner = ",\n".join(
                f"  {json.dumps(name)}: {json.dumps(said[name], sort_keys=True)}" for name in sorted(said)
            )
            parts.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(said)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    for deployment, facts in extracted(Path(sys.argv[1])).items():
        (HERE / f"{deployment}.json").write_text(lines_of(facts))

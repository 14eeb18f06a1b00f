"""What the proxy costs: CPU time a request and a streamed token, added time to the first token, memory.

    python -m bench.proxy_overhead --check
    python -m bench.proxy_overhead --baseline vllm-router --vllm-router VENV/bin/vllm-router --json results.json
    python -m bench.proxy_overhead --workers 2 --baseline ascend-example --ascend-example EXAMPLE.py

Two prefillers and four decoders are mocked (`bench.mock_engine`). They and the load generator run on one core, the
proxy under test on another, and only its own CPU time counts (user and system, all threads). Rounds of all proxies take
turns in the same run, so that a noisy machine disturbs them alike; the table has medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench.load_generator import LoadCase, LoadResult, run_load
from bench.proxy_processes import (
    HOST,
    Engines,
    Proxy,
    ascend_example_command,
    bare_relay_command,
    engines,
    free_port,
    haproxy_command,
    pd_proxy_command,
    proxy,
    vllm_router_command,
)

NUM_PREFILL, NUM_DECODE = 2, 4
US = 1e6
OURS = "pd-proxy"
PLOT_WIDTH = 60
BASELINES = ("vllm-router", "haproxy", "bare-relay", "ascend-example")

CASES = {
    case.name: case
    for case in (
        LoadCase("plain", 32, 60, 16, stream=False),
        LoadCase("unpaced", 32, 8, 256, stream=True),
        LoadCase("paced-256", 256, 1, 200, stream=True, interval_s=1 / 50),
        LoadCase("paced-1024", 1024, 1, 80, stream=True, interval_s=1 / 20),
        LoadCase("steady-256", 256, 3, 100, stream=True, interval_s=1 / 50, spread_s=2.0),
        LoadCase("long-256", 256, 2, 400, stream=True, interval_s=1 / 50, spread_s=2.0),
        LoadCase("prompt-1mb", 4, 12, 16, stream=False, prompt_chars=1 << 20),
        LoadCase("image-8mb", 2, 6, 16, stream=False, image_bytes=8 << 20),
        LoadCase("ttft", 4, 100, 8, stream=True),
    )
}
# microseconds of CPU, per token for the streamed cases, else per request (design.md, "The data plane")
BARS_US = {"plain": 60.0, "unpaced": 10.0, "paced-256": 10.0, "paced-1024": 10.0, "steady-256": 10.0, "long-256": 10.0}
BAR_OF_RIVAL = 0.5  # of vllm-router's CPU time, in every case of the same run
BAR_ADDED_TTFT_MS = {"steady-256": 2.0}  # p99, on an idle machine; in paced-256 all connect at once
BAR_RSS_MIB = {"paced-1024": 100.0}
WITH_DIRECT = ("ttft", "paced-256", "steady-256")  # the engines alone as well, for the time that the proxy adds
PER_TOKEN = frozenset(name for name, case in CASES.items() if case.stream and name != "ttft")


@dataclass
class Row:
    """The rounds of one proxy at one case. CPU in microseconds, per token or request (see PER_TOKEN)."""

    cpu_us: list[float] = field(default_factory=list)
    ttft_p50_ms: list[float] = field(default_factory=list)
    ttft_p99_ms: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, case: LoadCase, result: LoadResult, cpu_s: float, rss_bytes: int) -> None:
        self.errors += result.errors
        num = result.num_tokens if case.name in PER_TOKEN else result.num_right
        if not num:
            return
        ttft = sorted(result.ttft_s)
        self.cpu_us.append(cpu_s / num * US)
        self.ttft_p50_ms.append(ttft[len(ttft) // 2] * 1e3)
        self.ttft_p99_ms.append(ttft[int(len(ttft) * 0.99)] * 1e3)
        self.rss_mib.append(rss_bytes / 2**20)
        self.per_s.append(num / result.seconds)

    def median(self, name: str) -> float:
        return float(statistics.median(getattr(self, name) or [float("nan")]))


async def measure(target: Proxy | int, case: LoadCase, row: Row) -> None:
    """One round. A plain port is measured without CPU time (the engines themselves, for comparison)."""
    if isinstance(target, int):
        row.add(case, await run_load(HOST, target, case), 0.0, 0)
        return
    before_s = target.cpu_s()
    result = await run_load(HOST, target.port, case)
    row.add(case, result, target.cpu_s() - before_s, target.rss_bytes())


def set_pace(served: Engines, interval_s: float) -> None:
    body = json.dumps({"interval_s": interval_s}).encode()
    url = f"http://{HOST}:{served.control_port}/mock/config"
    urllib.request.urlopen(urllib.request.Request(url, body), timeout=10).close()


def start(
    options: argparse.Namespace, stack: contextlib.ExitStack, bench_core: int | None, proxy_core: int | None
) -> tuple[list[Proxy], list[Engines]]:
    """The proxy under test first, then the baselines asked for, all on the same core."""
    own = stack.enter_context(engines(NUM_PREFILL, NUM_DECODE, bench_core, "--no-record"))
    port = free_port()
    command = pd_proxy_command(options.proxy, port, own, *options.proxy_flags.split())
    proxies, served = [stack.enter_context(proxy(OURS, command, port, proxy_core))], [own]
    for num in options.workers:
        port = free_port()
        command = pd_proxy_command(options.proxy, port, own, *options.proxy_flags.split(), "--workers", str(num))
        proxies.append(stack.enter_context(proxy(f"{OURS} x{num}", command, port, proxy_core)))
    if options.baseline:
        others = stack.enter_context(engines(NUM_PREFILL, NUM_DECODE, bench_core, "--no-record", "--lenient"))
        served.append(others)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
    for name in options.baseline:
        port = free_port()
        if name == "vllm-router":
            command = vllm_router_command(options.vllm_router, port, others)
        elif name == "bare-relay":
            command = bare_relay_command(port, others, folder)
        elif name == "ascend-example":
            command = ascend_example_command(options.ascend_python, options.ascend_example, port, others)
        else:
            command = haproxy_command(options.haproxy, port, others, folder)
        proxies.append(stack.enter_context(proxy(name, command, port, proxy_core)))
    return proxies, served


def cores() -> tuple[int | None, int | None]:
    """One core for generator and engines, one for the proxy; None where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (None, None)


def run(options: argparse.Namespace) -> dict[str, dict[str, Row]]:
    """Rows by case, then by proxy."""
    bench_core, proxy_core = cores()
    if bench_core is not None:
        os.sched_setaffinity(0, {bench_core})
    rows: dict[str, dict[str, Row]] = {}
    with contextlib.ExitStack() as stack:
        proxies, served = start(options, stack, bench_core, proxy_core)
        for _ in range(options.rounds):
            for name in options.cases:
                case = CASES[name]
                for fleet in served:
                    set_pace(fleet, case.interval_s)
                row = rows.setdefault(name, {})
                for one in proxies:
                    uvloop.run(measure(one, case, row.setdefault(one.name, Row())))
                if name in WITH_DIRECT:
                    uvloop.run(measure(served[-1].decode_ports[0], case, row.setdefault("direct", Row())))
    return rows


def report(rows: dict[str, dict[str, Row]]) -> list[str]:
    """Print the table and the plot; return what missed its bar or went wrong."""
    print(
        f"{'case':<12}{'proxy':<15}{'CPU us':>9}{'':<6}{'bar':>6}  {'':<6}{'TTFT p50':>9}{'p99 ms':>9}{'per s':>9}"
        f"{'MiB':>7}  of vllm-router's"
    )
    missed = []
    for name, by_proxy in rows.items():
        for proxy_name, row in by_proxy.items():
            print(_line(name, proxy_name, row, by_proxy.get("vllm-router")))
            if row.errors and proxy_name != OURS:
                print(f"{'':<12}{proxy_name}: {len(row.errors)} errors, such as {row.errors[0][:200]}")
        missed += _missed(name, by_proxy)
    print()
    for name, by_proxy in rows.items():
        print("\n".join(_plot(name, by_proxy)))
    return missed


def _line(case: str, who: str, row: Row, rival: Row | None) -> str:
    cpu_us, bar = row.median("cpu_us"), BARS_US.get(case) if who == OURS else None
    verdict = "" if bar is None else "pass" if cpu_us <= bar else "MISS"
    share = "" if rival is None else f"{cpu_us / rival.median('cpu_us'):>8.2f}"
    return (
        f"{case:<12}{who:<15}{cpu_us:>9.1f}{_unit(case):<6}{bar or '':>6}  {verdict:<6}"
        f"{row.median('ttft_p50_ms'):>9.2f}{row.median('ttft_p99_ms'):>9.2f}"
        f"{row.median('per_s'):>9.0f}{row.median('rss_mib'):>7.0f}{share}"
    )


def _unit(case: str) -> str:
    return "/token" if case in PER_TOKEN else "/req"


def _missed(case: str, by_proxy: dict[str, Row]) -> list[str]:
    """The bars that pd-proxy misses in one case."""
    own, rival, direct = by_proxy[OURS], by_proxy.get("vllm-router"), by_proxy.get("direct")
    cpu_us, bar = own.median("cpu_us"), BARS_US.get(case)
    found = []
    if bar is not None and not cpu_us <= bar:  # not a number is a miss
        found.append(f"{case}: {cpu_us:.1f} us{_unit(case)}, the bar is {bar}")
    if rival is not None and not cpu_us <= BAR_OF_RIVAL * rival.median("cpu_us"):
        found.append(f"{case}: {cpu_us / rival.median('cpu_us'):.2f} of vllm-router's CPU, the bar is {BAR_OF_RIVAL}")
    if own.median("rss_mib") > BAR_RSS_MIB.get(case, float("inf")):
        found.append(f"{case}: {own.median('rss_mib'):.0f} MiB, the bar is {BAR_RSS_MIB[case]:.0f}")
    if own.errors:
        found.append(f"{case}: wrong or missing answers, such as {own.errors[0]}")
    if direct is not None:
        added = {name: own.median(name) - direct.median(name) for name in ("ttft_p50_ms", "ttft_p99_ms")}
        print(f"{case:<12}added TTFT p50 {added['ttft_p50_ms']:.2f} ms, p99 {added['ttft_p99_ms']:.2f} ms")
        bar_ms = BAR_ADDED_TTFT_MS.get(case, float("inf"))
        if not added["ttft_p99_ms"] <= bar_ms:
            found.append(f"{case}: {added['ttft_p99_ms']:.2f} ms added to TTFT p99, the bar is {bar_ms}")
    return found


def _plot(case: str, by_proxy: dict[str, Row]) -> list[str]:
    """CPU time as bars, the dearest as long as PLOT_WIDTH."""
    values = {who: row.median("cpu_us") for who, row in by_proxy.items() if row.median("cpu_us") > 0}
    dearest = max(values.values(), default=0.0)
    lines = [f"{case}, us{_unit(case)}"]
    for who, value in values.items():
        lines.append(f"  {who:<15}{'█' * max(1, round(value / dearest * PLOT_WIDTH))} {value:.1f}")
    return lines


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")
    return {"cpu": model, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def parser() -> argparse.ArgumentParser:
    own = Path(sys.executable).with_name("pd-proxy")
    options = argparse.ArgumentParser(prog="python -m bench.proxy_overhead", description=__doc__.partition("\n")[0])
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", type=Path, help="write every round's figures there")
    options.add_argument("--check", action="store_true", help="exit 1 if a bar is missed or an answer is wrong")
    options.add_argument("--proxy", default=str(own), help="the pd-proxy to measure (%(default)s)")
    options.add_argument("--proxy-flags", default="", help="more flags for it, in one string")
    options.add_argument(
        "--baseline", nargs="*", choices=BASELINES, default=[], help="rivals to measure in the same run"
    )
    options.add_argument("--workers", nargs="*", type=int, default=[], help="our proxy again, with so many workers")
    options.add_argument("--ascend-example", type=Path, help="vllm-ascend's load_balance_proxy_server_example.py")
    options.add_argument("--ascend-python", default=sys.executable, help="a Python that has fastapi, httpx and uvicorn")
    options.add_argument("--vllm-router", default=shutil.which("vllm-router"), help="its executable")
    options.add_argument("--haproxy", default=shutil.which("haproxy") or "/usr/sbin/haproxy", help="its executable")
    return options


def main() -> int:
    options = parser().parse_args()
    if "vllm-router" in options.baseline and not options.vllm_router:
        parser().error("vllm-router is not installed: pip install vllm-router into a venv, then --vllm-router PATH")
    if "ascend-example" in options.baseline and options.ascend_example is None:
        parser().error("ascend-example needs --ascend-example PATH")
    if "bare-relay" in options.baseline and not shutil.which("cc"):
        parser().error("bare-relay needs a C compiler: install gcc")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows = run(options)
    missed = report(rows)
    for line in missed:
        print("FAILED", line)
    if options.json:
        found = {name: {who: asdict(row) for who, row in by_proxy.items()} for name, by_proxy in rows.items()}
        options.json.write_text(json.dumps({"machine": machine(), "bars_us": BARS_US, "cases": found}, indent=1))
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())

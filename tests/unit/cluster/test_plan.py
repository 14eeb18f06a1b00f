from __future__ import annotations

import dataclasses
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.cluster.config import COMPUTED_ARGS, ClusterConfig, parse
from engine_adapter.cluster.plan import Plan, Site, kv_pool_bytes, num_free_ports, plan

SITE = Site("models/m", "/tmp/s", num_cores=8, free_ports=tuple(range(17001, 17101)))
FILE = """
[cluster]
name = "c"
[model]
path = "models/m"
dtype = "float32"
[engine]
kv_pool = "1MiB"
max_model_len = 512
args = { max-num-seqs = 8, no-enable-prefix-caching = true, verbose = false }
[sidecar]
transport = "shm"
[proxy]
policy = "least_load"
args = { max_retries = 2 }
[[instance]]
role = "prefill"
port = 8100
args = { max-num-seqs = 4 }
[[instance]]
role = "decode"
count = 2
"""


def planned(text: str = FILE, site: Site = SITE) -> Plan:
    return plan(parse(text, "f.toml"), site)


def test_every_command_stands_as_a_shell_takes_it() -> None:
    assert [f"{process.name}: {process.shell_line()}" for process in planned().processes] == [
        "prefill-0.sidecar: PYTHONUNBUFFERED=1 pd-sidecar --socket /tmp/s/prefill-0.sock --listen 127.0.0.1:17001 "
        "--engine-id c-prefill-0 --rank 0 --transport shm --metrics-port 17002",
        "decode-0.sidecar: PYTHONUNBUFFERED=1 pd-sidecar --socket /tmp/s/decode-0.sock --listen 127.0.0.1:17004 "
        "--engine-id c-decode-0 --rank 0 --transport shm --metrics-port 17005",
        "decode-1.sidecar: PYTHONUNBUFFERED=1 pd-sidecar --socket /tmp/s/decode-1.sock --listen 127.0.0.1:17007 "
        "--engine-id c-decode-1 --rank 0 --transport shm --metrics-port 17008",
        "prefill-0: PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 pd-engine serve --model models/m "
        "--served-model-name m --role prefill --host 127.0.0.1 --port 8100 --device cpu --dtype float32 "
        "--sidecar /tmp/s/prefill-0.sock --engine-id c-prefill-0 --max-model-len 512 --block-size 16 "
        "--kv-pool-bytes 1048576 --num-threads 2 --max-num-seqs 4 --no-enable-prefix-caching",
        "decode-0: PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 pd-engine serve --model models/m "
        "--served-model-name m --role decode --host 127.0.0.1 --port 17003 --device cpu --dtype float32 "
        "--sidecar /tmp/s/decode-0.sock --engine-id c-decode-0 --max-model-len 512 --block-size 16 "
        "--kv-pool-bytes 1048576 --num-threads 2 --max-num-seqs 8 --no-enable-prefix-caching",
        "decode-1: PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 pd-engine serve --model models/m "
        "--served-model-name m --role decode --host 127.0.0.1 --port 17006 --device cpu --dtype float32 "
        "--sidecar /tmp/s/decode-1.sock --engine-id c-decode-1 --max-model-len 512 --block-size 16 "
        "--kv-pool-bytes 1048576 --num-threads 2 --max-num-seqs 8 --no-enable-prefix-caching",
        "proxy: PYTHONUNBUFFERED=1 pd-proxy --host 127.0.0.1 --port 8000 --prefiller-hosts 127.0.0.1 "
        "--prefiller-ports 8100 --decoder-hosts 127.0.0.1 127.0.0.1 --decoder-ports 17003 17006 --policy least_load "
        "--max-retries 2",
    ]


def test_an_engine_waits_for_its_sidecar_always_and_the_proxy_for_the_engines_once() -> None:
    order = {process.name: (process.needs, process.after) for process in planned().processes}
    assert order["prefill-0.sidecar"] == ((), ())
    assert order["decode-1"] == (("decode-1.sidecar",), ())
    assert order["proxy"] == ((), ("prefill-0", "decode-0", "decode-1"))


def test_the_proxy_stops_first_and_the_sidecars_last() -> None:
    stages = [[process.name for process in stage] for stage in planned().stop_stages()]
    assert stages == [
        ["proxy"],
        ["prefill-0", "decode-0", "decode-1"],
        ["prefill-0.sidecar", "decode-0.sidecar", "decode-1.sidecar"],
    ]


def test_health_is_asked_where_each_kind_has_it() -> None:
    by_name = {process.name: process for process in planned().processes}
    assert by_name["prefill-0"].health_url == "http://127.0.0.1:8100/health"
    assert by_name["prefill-0.sidecar"].health_url == "http://127.0.0.1:17002/healthz"
    assert by_name["prefill-0.sidecar"].metrics_url == "http://127.0.0.1:17002/metrics"
    assert by_name["proxy"].health_url == "http://127.0.0.1:8000/health"


def test_who_listens_everywhere_is_reached_on_loopback() -> None:
    processes = planned('[cluster]\nhost = "0.0.0.0"\n' + FILE.replace('[cluster]\nname = "c"\n', "")).processes
    proxy = processes[-1]
    assert proxy.argv[proxy.argv.index("--host") + 1] == "0.0.0.0"
    assert proxy.argv[proxy.argv.index("--prefiller-hosts") + 1] == "127.0.0.1"
    assert proxy.health_url == "http://127.0.0.1:8000/health"


def test_an_ipv6_host_is_bracketed_where_a_port_follows() -> None:
    processes = planned('[cluster]\nhost = "::1"\n' + FILE.replace('[cluster]\nname = "c"\n', "")).processes
    assert processes[0].argv[processes[0].argv.index("--listen") + 1] == "[::1]:17001"
    assert processes[0].address == "[::1]:17001"
    assert processes[-1].health_url == "http://[::1]:8000/health"


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (3, 1), (8, 2), (13, 4)])
def test_cores_are_shared_out_among_the_engines(num_cores: int, num_threads: int) -> None:
    processes = planned(site=dataclasses.replace(SITE, num_cores=num_cores)).of_kind("engine")
    for engine in processes:
        assert engine.argv[engine.argv.index("--num-threads") + 1] == str(num_threads)
        assert engine.env["OMP_NUM_THREADS"] == str(num_threads)


def test_a_file_that_says_the_threads_is_obeyed() -> None:
    engine = planned(FILE.replace("[engine]", "[engine]\nnum_threads = 5")).of_kind("engine")[0]
    assert engine.env["OMP_NUM_THREADS"] == "5"


def test_blocks_may_be_counted_instead_of_bytes() -> None:
    text = FILE.replace('kv_pool = "1MiB"', "num_blocks = 100")
    engine = planned(text).of_kind("engine")[0]
    assert "--kv-pool-bytes" not in engine.argv
    assert engine.argv[engine.argv.index("--num-blocks") + 1] == "100"
    assert kv_pool_bytes(parse(text, ""), block_bytes=10) == 3 * 100 * 10
    assert kv_pool_bytes(parse(FILE, ""), block_bytes=10) == 3 * 1024**2


def test_every_flag_the_plan_writes_is_refused_in_args() -> None:
    bare = "\n".join(line for line in FILE.splitlines() if not line.startswith("args"))
    for process in planned(bare).processes:
        flags = {word.removeprefix("--") for word in process.argv if word.startswith("--")}
        assert flags <= set(COMPUTED_ARGS[process.kind])


@st.composite
def configs(draw: st.DrawFn) -> ClusterConfig:
    """Any topology whose fixed ports can't clash."""
    lines, port = ['[model]\npath = "m"'], 20000
    for role in ["prefill", "decode", *draw(st.lists(st.sampled_from(["prefill", "decode"]), max_size=3))]:
        count = draw(st.integers(1, 5))
        fixed = port if draw(st.booleans()) else 0
        port += count
        lines.append(f'[[instance]]\nrole = "{role}"\ncount = {count}\nport = {fixed}')
    ports = [draw(st.sampled_from([0, 30000])), draw(st.sampled_from([0, 31000]))]
    lines.append(f"[sidecar]\nport = {ports[0]}\nmetrics_port = {ports[1]}")
    lines.append(f"[proxy]\nport = {draw(st.sampled_from([0, 8000]))}")
    return parse("\n".join(lines), "f.toml")


@given(configs())
def test_no_port_name_or_engine_id_is_used_twice_and_the_proxy_knows_every_engine(config: ClusterConfig) -> None:
    num_free = num_free_ports(config)
    result = plan(config, dataclasses.replace(SITE, free_ports=tuple(range(17001, 17001 + num_free))))
    ports = list(chain.from_iterable(process.ports for process in result.processes))
    assert len(set(ports)) == len(ports)
    assert {port for port in ports if port < 20000 and port != 8000} == set(range(17001, 17001 + num_free))
    assert len({process.name for process in result.processes}) == len(result.processes)
    engines = result.of_kind("engine")
    argv = result.proxy.argv
    prefillers = argv[argv.index("--prefiller-ports") + 1 : argv.index("--decoder-hosts")]
    decoders = argv[argv.index("--decoder-ports") + 1 :]
    assert [*prefillers] == [str(engine.port) for engine in engines if engine.role == "prefill"]
    assert [*decoders] == [str(engine.port) for engine in engines if engine.role == "decode"]
    assert [engine.needs for engine in engines] == [(sidecar.name,) for sidecar in result.of_kind("sidecar")]


def test_the_store_is_behind_every_prefiller() -> None:
    store = '[store]\nmemory = "1MiB"\ndir = "/kv"\ndir_size = "1GB"\nmooncake = "m:1"\nmooncake_segment = 0\n'
    sidecars = {process.name: process.shell_line() for process in planned(store + FILE).of_kind("sidecar")}
    assert sidecars["prefill-0.sidecar"].endswith(
        "--store-memory-bytes 1048576 --store-dir /kv --store-dir-bytes 1000000000 --store-mooncake m:1 "
        "--store-mooncake-segment-bytes 0"
    )
    assert not any("--store" in line for name, line in sidecars.items() if "decode" in name)

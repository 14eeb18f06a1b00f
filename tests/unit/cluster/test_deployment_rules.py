"""What is refused, with key, value, reason and remedy; everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_adapter.cluster.deployment import is_deployment
from engine_adapter.cluster.deployment_rules import load, parse
from engine_adapter.cluster.errors import ClusterError, ConfigError
from tests.unit.cluster.deployments import FILES, NAMES, SMALL


def refused(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "FILE")
    assert all(line.startswith("FILE: ") for line in caught.value.problems)
    return [line.removeprefix("FILE: ") for line in caught.value.problems]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_deployments_of_the_repository_are_right(path: Path) -> None:
    load(path)


PREFILL = '[[instance]]\nrole = "prefill"\nnodes = ["10.0.0.1"]\n'
DECODE = '[[instance]]\nrole = "decode"\nnodes = ["10.0.0.2"]\n'

WRONG = {
    "a misspelt key": (
        ("[decode]\ntp = 2", "[decode]\ntp = 2\nport_kv = 1"),
        'unknown key "decode.port_kv"; known here: args, dp, dp_mode, env, ep, pp, tp',
    ),
    "a misspelt section": (
        ("[prefill]\ntp = 2\n", "[prefil]\ntp = 2\n"), 'unknown key "prefil"; did you mean "prefill"?'),
    "no prefiller": ((PREFILL, ""), 'instance = []: there is no prefiller; add an [[instance]] with role = "prefill"'),
    "a node nobody knows": (
        ('role = "decode"\nnodes = ["10.0.0.2"]', 'role = "decode"\nnodes = ["10.0.0.20"]'),
        'instance[1].nodes = 10.0.0.20: no [[node]] has this address; did you mean "10.0.0.2"?',
    ),
    "too few devices": (
        ("[decode]\ntp = 2", "[decode]\ntp = 16"),
        "instance[1].nodes = 10.0.0.2: decode-0 needs 16 devices there; 8 of its 8 are free; "
        "lower tp, pp or dp, add a node, or correct node.devices",
    ),
    "two roles on one device": (
        (PREFILL, PREFILL + "devices = [0, 1]\n" + DECODE.replace("10.0.0.2", "10.0.0.1") + "devices = [1, 2]\n"),
        "instance[1].devices = [1, 2]: device 1 of 10.0.0.1 belongs to prefill-0 already; "
        "give each device to one instance",
    ),
    "a device that is not there": (
        (DECODE, DECODE + "devices = [7, 8]\n"),
        "instance[1].devices = [7, 8]: 10.0.0.2 has devices 0 to 7; count from 0, or correct node.devices",
    ),
    "devices that tp does not divide": (
        (DECODE, DECODE + "devices = [0, 1, 2]\n"),
        "instance[1].devices = [0, 1, 2]: 2 different devices a node are needed (1 ranks of tp 2 * pp 1); "
        "list so many, or leave it out",
    ),
    "ranks that nodes do not divide": (
        ('nodes = ["10.0.0.2"]', 'nodes = ["10.0.0.2", "10.0.0.1"]\ndp = 3'),
        "instance[1].dp = 3: 3 data-parallel ranks can't be shared out evenly over 2 nodes; "
        "give a multiple of 2, or other nodes; one rank can't span nodes",
    ),
    "prefill tp smaller than decode tp": (
        ("[decode]\ntp = 2", "[decode]\ntp = 4"),
        "decode.tp = 4: it is larger than prefill-0's tp = 2, and MooncakeConnectorV1 can't spread KV over more ranks; "
        "raise the prefillers' tp, or lower this",
    ),
    "tp that does not divide": (
        ("[prefill]\ntp = 2", "[prefill]\ntp = 3"),
        "decode.tp = 2: it and prefill-0's tp = 3 do not divide each other, so no rank's KV fits another's; "
        "give sizes of which one divides the other",
    ),
    "unlike instances of a role": (
        (DECODE, DECODE + DECODE + "tp = 1\n"),
        "instance[2].tp = 1: decode-0 has 2, and MooncakeConnectorV1 knows one size a role; say tp once, in [decode]",
    ),
    "pipeline stages on the decoder": (
        ("[decode]\ntp = 2", "[decode]\ntp = 2\npp = 2"),
        "decode.pp = 2: MooncakeConnectorV1 takes no pipeline stages there; give 1",
    ),
    "experts over half of the ranks": (
        ("[decode]\ntp = 2", "[decode]\ntp = 2\ndp = 2\nep = 2"),
        "decode.ep = 2: the experts are spread over dp * tp = 4 ranks, or over none; give 4, or 1 for none",
    ),
    "ports that clash": (
        ('nodes = ["10.0.0.1"]\n', 'nodes = ["10.0.0.1"]\nport = 8000\n'),
        "instance[0].port = 8000: prefill-0's HTTP and the proxy would both listen on port 8000 of 10.0.0.1; "
        "give it another",
    ),
    "a port of Mooncake's": (
        (PREFILL, PREFILL + "kv_port = 16000\n"),
        "instance[0].kv_port = 16000: prefill-0's KV: Mooncake takes ports of 15000-17000 at random; give it another",
    ),
    "a port of ADXL's": (
        (PREFILL, PREFILL + "kv_port = 20001\n"),
        "instance[0].kv_port = 20001: prefill-0's KV: ADXL listens on 20000-27999 of a node with 8 chips; "
        "give it another",
    ),
    "a port too high": (
        (PREFILL, PREFILL + "kv_port = 65535\n"),
        "instance[0].kv_port = 65536: prefill-0's KV on 10.0.0.1 goes beyond 65535; give it another",
    ),
    "UCM without a shared directory": (
        ("[prefill]", '[store]\nkind = "ucm"\n\n[prefill]'),
        "store.directory = '': UCM keeps its blocks in files that all prefillers share; "
        "give a directory, from the root, that every node mounts (NFS, 3FS)",
    ),
    "a connector of another engine": (
        ("MooncakeConnectorV1", "NixlConnector"),
        "connector.name = NixlConnector: vllm-ascend 0.11.0 has no connector of this name that hands KV over; "
        "it has BatonConnector, LLMDataDistCMgrConnector, MooncakeConnector, MooncakeConnectorV1, "
        "MooncakeLayerwiseConnector",
    ),
    "a connector that is gone": (
        ('version = "0.11.0" }\nconnector = { name = "MooncakeConnectorV1"',
         'version = "0.12.0" }\nconnector = { name = "LLMDataDistCMgrConnector"'),
        "connector.name = LLMDataDistCMgrConnector: vllm-ascend 0.12.0 has no connector of this name that hands "
        "KV over; it has BatonConnector, MooncakeConnector, MooncakeConnectorV1, MooncakeLayerwiseConnector",
    ),
    "a version nobody knows": (
        ("0.11.0", "0.8.4"),
        "engine.engine_version = 0.8.4: plans are made for vllm-ascend from 0.9.1 and before 0.27.0; "
        "give a version of these",
    ),
    "a variable of an older version": (
        ('version = "0.11.0" }', 'version = "0.13.0", env = { VLLM_USE_V1 = 1 } }'),
        "engine.env.VLLM_USE_V1 = 1: vllm-ascend 0.13.0 does not know it, but versions before 0.12.0; "
        "leave it out: there is nothing but V1 any more",
    ),
    "an argument of an older version": (
        ('version = "0.11.0" }', 'version = "0.12.0", args = { disable_log_requests = true } }'),
        "engine.args.disable_log_requests = True: vllm-ascend 0.12.0 does not know it, but versions before 0.12.0; "
        "leave it out: it is what they do unasked",
    ),
    "a key that means nothing": (
        ("[decode]\n", "[decode]\nargs = { additional-config = { lm_head_tensor_parallel_size = 2 } }\n"),
        "decode.args.additional-config.lm_head_tensor_parallel_size = 2: vllm-ascend 0.11.0 does not know it, "
        "as no version does; write lmhead_tensor_parallel_size",
    ),
    "a flag that is computed": (
        ("[decode]\n", "[decode]\nargs = { tensor_parallel_size = 8 }\n"),
        "decode.args.tensor_parallel_size = 8: the plan computes it; "
        "leave it out, and say by its own key what it follows from",
    ),
    "a variable that is computed": (
        ("[decode]\n", '[decode]\nenv = { ASCEND_RT_VISIBLE_DEVICES = "0" }\n'),
        "decode.env.ASCEND_RT_VISIBLE_DEVICES = 0: the plan computes it; "
        "leave it out, and say by its own key what it follows from",
    ),
    "an engine on the wrong hardware": (
        ('{ address = "10.0.0.2" }', '{ address = "10.0.0.2", hardware = "gpu" }'),
        "node[1].hardware = gpu: vllm-ascend does not run there; give one of A2, A3, or another engine.kind",
    ),
    "unlike hardware": (
        ('{ address = "10.0.0.2" }', '{ address = "10.0.0.2", hardware = "A3", devices = 16 }'),
        "node[1].hardware = A2 and A3: MooncakeConnectorV1 does not join unlike hardware; use nodes of one kind",
    ),
    "a node twice": (
        ('{ address = "10.0.0.2" }', '{ address = "10.0.0.2" }, { address = "10.0.0.2" }'),
        "node[2].address = 10.0.0.2: this node was described before; remove one, or correct the address",
    ),
    "an address of each device, almost": (
        ('{ address = "10.0.0.2" }', '{ address = "10.0.0.2", device_ips = ["10.1.0.1"] }'),
        "node[1].device_ips = ['10.1.0.1']: there are 1 for 8 devices; give one for each device, or none",
    ),
    "a word that is not known": (
        ('role = "decode"', 'role = "decoder"'), "instance[1].role = 'decoder' is not known; did you mean \"decode\"?",
    ),
    "a zero byte": (
        ("[decode]\n", '[decode]\nenv = { A = "\\u0000" }\n'),
        "the file = ...: it has a zero byte, which no command line takes; remove \\u0000",
    ),
    "a date where JSON is meant": (
        ("[decode]\n", "[decode]\nargs = { x = 2026-01-01 }\n"),
        "decode.args.x = datetime.date(2026, 1, 1): input was not a valid JSON value",
    ),
    "a name that is no variable": (
        ("[decode]\n", '[decode]\nenv = { "A B" = 1 }\n'),
        "decode.env.A B = 'A B': give a variable's name: letters, digits and underscores, first no digit",
    ),
    "a variable that is a list": (
        ("[decode]\n", "[decode]\nenv = { A = [1] }\n"),
        "decode.env.A = [1]: give text, a number or false",
    ),
    "a number in words": (("[decode]\ntp = 2", '[decode]\ntp = "two"'), "decode.tp = 'two': give a whole number"),
    "an address with a blank": (
        ('{ address = "10.0.0.2" }', '{ address = "10.0.0.2 " }'),
        "node[1].address = '10.0.0.2 ': give a host's name or IP address, without port or blanks",
    ),
    "one node, and no list of them": (
        ('node = [{ address = "10.0.0.1" }, { address = "10.0.0.2" }]', 'node = { address = "10.0.0.1" }'),
        "node = {'address': '10.0.0.1'}: give a list; of a section, write its name as [[name]]",
    ),
    "several devices of another's": (
        (PREFILL, PREFILL + "devices = [0, 1]\n" + DECODE.replace("10.0.0.2", "10.0.0.1") + "devices = [1, 0]\n"),
        "instance[1].devices = [1, 0]: devices 1, 0 of 10.0.0.1 belong to prefill-0 already; "
        "give each device to one instance",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "line"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_one_line(change: tuple[str, str], line: str) -> None:
    assert change[0] in SMALL
    assert line in refused(SMALL.replace(change[0], change[1], 1))


def test_every_mistake_is_said_at_once() -> None:
    text = (
        SMALL.replace("[decode]\ntp = 2", "[decode]\ntp = 4\nnonsense = 1")
        .replace(PREFILL, PREFILL + "kv_port = 20001\n")
        .replace('engine_version = "0.11.0" }', 'engine_version = "0.13.0", env = { VLLM_USE_V1 = 1 } }')
        .replace("[prefill]", '[store]\nkind = "ucm"\n\n[prefill]')
    )
    keys = [line.split(" = ")[0] for line in refused(text)]
    wanted = ['unknown key "decode.nonsense"; known here: args, dp, dp_mode, env, ep, pp, tp', "engine.env.VLLM_USE_V1"]
    wanted += ["store.directory", "decode.tp", "instance[0].kv_port"]
    assert keys == wanted


def test_a_value_that_cannot_be_read_hides_nothing_else() -> None:
    """But what it may have to do with: tp and the sizes of the others, and devices for so many ranks."""
    text = (
        SMALL.replace("[decode]\ntp = 2", '[decode]\ntp = "four"\nenv = { HCCL_IF_IP = "1" }\nnonsense = 1')
        .replace("[prefill]\ntp = 2", '[store]\nkind = "ucm"\n\n[prefill]\ntp = 16')
        .replace('role = "prefill"\nnodes = ["10.0.0.1"]', 'role = "prefill"\nnodes = ["10.0.0.9"]')
        .replace('{ address = "10.0.0.2" }', '{ address = "10.0.0.2", devices = 0, device_ips = ["1"] }')
    )
    keys = [line.split(" = ")[0] for line in refused(text)]
    unknown = 'unknown key "decode.nonsense"; known here: args, dp, dp_mode, env, ep, pp, tp'
    assert keys == ["node[1].devices", "decode.tp", unknown, "store.directory", "instance[0].nodes"]


def test_a_slip_in_the_nodes_name_is_not_taken_for_a_cluster_on_this_machine() -> None:
    text = SMALL.replace("node = [", "nodes = [")
    assert is_deployment(text) and not is_deployment('[model]\npath = "/m"\n')
    assert refused(text) == ['key "node" is missing', 'unknown key "nodes"; did you mean "node"?']


def test_what_is_no_text_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(b"name = '\xff'\n")
    with pytest.raises(ConfigError, match=r"file.toml: not UTF-8 \(byte 8\); write it as UTF-8"):
        load(path)


def test_keys_that_vllm_0_32_dropped() -> None:
    text = SMALL.replace("vllm-ascend", "vllm").replace("MooncakeConnectorV1", "NixlConnector")
    text = text.replace('" }, {', '", hardware = "gpu" }, {').replace('2" }]', '2", hardware = "gpu" }]')
    text = text.replace('"NixlConnector" }', '"NixlConnector", config = { kv_parallel_size = 1 } }')
    parse(text.replace("0.11.0", "0.23.0"), "FILE")
    assert refused(text.replace("0.11.0", "0.32.0")) == [
        "connector.config.kv_parallel_size = 1: vllm 0.32.0 does not know it, but versions before 0.32.0; "
        "leave it out: vLLM refuses unknown keys"
    ]


def test_one_engine_of_torch_takes_one_device() -> None:
    text = SMALL.replace("vllm-ascend", "torch").replace("MooncakeConnectorV1", "BatonConnector")
    assert "instance[0] = dp 1, tp 2, pp 1: torch_engine takes one device an instance; give more instances instead" in (
        refused(text)
    )


def test_layerwise_push_of_our_connector_takes_one_rank() -> None:
    pushes = '{ name = "BatonConnector", extra = { contract = "layerwise" } }'
    assert (
        "decode.tp = 2: BatonConnector pushes layerwise from an instance of one rank to another; give 1, or leave "
        "connector.extra.contract out"
    ) in refused(SMALL.replace('{ name = "MooncakeConnectorV1" }', pushes))


def test_what_is_no_toml_says_so() -> None:
    (line,) = refused("[[node]\n")
    assert line.startswith("not TOML: ")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ClusterError, match=r"nowhere.toml: No such file or directory; deployments are under"):
        load(Path("nowhere.toml"))


def test_a_port_outside_mooncake_is_free_to_llmdatadist() -> None:
    """ADXL and its ports are Mooncake's."""
    text = SMALL.replace("MooncakeConnectorV1", "LLMDataDistCMgrConnector")
    parse(text.replace(PREFILL, PREFILL + "port = 20002\n"), "FILE")

from __future__ import annotations

from pathlib import Path

import pytest

from engine_adapter.cluster.config import ClusterConfig, load, parse, with_flags
from engine_adapter.cluster.errors import ClusterError, ConfigError

EXAMPLES = sorted((Path(__file__).parents[3] / "configs/examples").glob("*.toml"))
SMALLEST = """
[model]
path = "models/m"
[[instance]]
role = "prefill"
[[instance]]
role = "decode"
"""


def problem_of(text: str, status: int) -> str:
    with pytest.raises(ClusterError) as caught:
        parse(text, "f.toml")
    assert caught.value.status == status
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_right(path: Path) -> None:
    config = load(path)
    assert config.cluster.name == path.stem
    assert sum(group.count for group in config.instance) == {"1p1d-cpu": 2, "2p2d-cpu": 4, "vl-1p1d-cpu": 2}[path.stem]


def test_there_are_the_two_examples() -> None:
    assert [path.name for path in EXAMPLES] == ["1p1d-cpu.toml", "2p2d-cpu.toml", "vl-1p1d-cpu.toml"]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("[engine]\nblok_size = 16", 'f.toml: unknown key "engine.blok_size"; did you mean "block_size"?'),
        ("[prxy]\nport = 1", 'f.toml: unknown key "prxy"; did you mean "proxy"?'),
        ("[[instance]]\nrole = 'decode'\nprot = 1", 'f.toml: unknown key "instance[2].prot"; did you mean "port"?'),
        (
            "[[instance]]\nrole = 'decoder'",
            "f.toml: instance[2].role = 'decoder' is not known; did you mean \"decode\"?",
        ),
        ("[[instance]]\nport = 1", 'f.toml: key "instance[2].role" is missing'),
        (
            "[engine]\nblock_size = 0",
            "f.toml: engine.block_size = 0: input should be greater than or equal to 1",
        ),
        (
            "[engine.args]\nblock-size = 1",
            'f.toml: "engine.args.block-size" is computed by the plan; say it by its own key instead',
        ),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_right_one(wrong: str, line: str) -> None:
    assert problem_of(SMALLEST + wrong, 2) == line


def test_a_key_under_a_table_that_may_be_absent_is_named() -> None:
    text = SMALLEST.replace('path = "models/m"', 'make = { famly = "qwen3" }')
    assert problem_of(text, 2) == 'f.toml: unknown key "model.make.famly"; did you mean "family"?'


def test_what_is_not_toml_is_said_with_its_line() -> None:
    assert "not TOML" in problem_of("[model\n", 2)
    assert "line 1" in problem_of("[model\n", 2)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(SMALLEST + "[proxy]\nprt = 1\n[engine]\nsize = 2\n", "f.toml")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            SMALLEST.replace('"prefill"', '"decode"'),
            'f.toml: no prefiller; add an [[instance]] with role = "prefill"',
        ),
        (
            SMALLEST.replace('"decode"', '"prefill"'),
            'f.toml: no decoder; add an [[instance]] with role = "decode"',
        ),
        (
            SMALLEST.replace("path", "make = {}\npath"),
            "f.toml: give model.path or model.make, one of the two",
        ),
        (
            SMALLEST + "[engine]\nnum_blocks = 4\nkv_pool = '1MiB'",
            "f.toml: give engine.num_blocks or engine.kv_pool, one of the two",
        ),
        (
            SMALLEST + "count = 3\nport = 7998",
            "f.toml: port 8000 is used more than once (proxy, decode); give one of them another, or 0 to have one "
            "chosen",
        ),
        (
            SMALLEST + "[sidecar]\nport = 9000\nmetrics_port = 9001",
            "f.toml: port 9001 is used more than once (sidecar, sidecar metrics); give one of them another, or 0 to "
            "have one chosen",
        ),
        (
            SMALLEST + "[store]\ndir = 'here'",
            'f.toml: store.dir = "here" is no absolute path; begin it with /',
        ),
        (
            SMALLEST + "[store]\ndir_size = '1GiB'",
            "f.toml: store.dir_size is the size of store.dir; give that too, or neither",
        ),
        (
            SMALLEST + "[store]\nmooncake_segment = '1GiB'",
            "f.toml: store.mooncake_segment is for store.mooncake; give that too, or neither",
        ),
        (SMALLEST + "count = 2\nport = 65535", "f.toml: port 65536 (decode) is over 65535; begin lower"),
    ],
)
def test_a_file_at_odds_with_itself_is_refused_with_what_to_do(text: str, line: str) -> None:
    assert problem_of(text, 1) == line


def test_an_absent_file_is_said() -> None:
    with pytest.raises(ClusterError, match=r"no/such\.toml: No such file or directory; examples") as caught:
        load(Path("no/such.toml"))
    assert caught.value.status == 1


def test_the_command_line_stands_above_the_file() -> None:
    config = with_flags(parse(SMALLEST, "f.toml"), "f.toml", model_dir="elsewhere", port=9)
    assert (config.model.path, config.proxy.port) == ("elsewhere", 9)
    made = parse(SMALLEST.replace('path = "models/m"', "make = {}"), "f.toml")
    assert with_flags(made, "f.toml", model_dir="elsewhere", port=None).model.make is None
    assert with_flags(made, "f.toml", model_dir=None, port=None) == made


def test_a_port_of_the_command_line_clashes_as_one_of_the_file_does() -> None:
    config = parse(SMALLEST + "port = 7000", "f.toml")
    with pytest.raises(ClusterError, match="port 7000 is used more than once"):
        with_flags(config, "f.toml", model_dir=None, port=7000)
    with pytest.raises(ConfigError, match=r"proxy\.port = 70000"):
        with_flags(config, "f.toml", model_dir=None, port=70000)


def test_a_config_is_frozen() -> None:
    config = parse(SMALLEST, "f.toml")
    with pytest.raises(ValueError, match="frozen"):
        config.proxy.port = 1  # type: ignore[misc]
    assert isinstance(config, ClusterConfig)

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.cli import main, read_config
from proxy.config import Address
from proxy.errors import ConfigError


def flags(line: str) -> list[str]:
    return line.split()


def test_the_seeds_defaults() -> None:
    config = read_config([])
    assert (config.host, config.port) == ("localhost", 8000)
    assert config.prefillers == (Address("localhost", 8001),) and config.decoders == (Address("localhost", 8002),)
    assert (config.max_retries, config.retry_delay, config.max_waiting_retries) == (3, 0.001, 3)
    assert (config.waiting_retry_interval, config.workers, config.log_level) == (10, 1, "INFO")


def test_the_commands_of_the_seeds() -> None:
    config = read_config(
        flags(
            "--host 172.19.32.175 --port 1025 --prefiller-hosts 172.19.241.49 --prefiller-port 20002 "
            "--decoder-hosts 172.19.123.51 --decoder-ports 20002"
        )
    )
    assert config.prefillers == (Address("172.19.241.49", 20002),)
    config = read_config(
        flags(
            "--host 192.0.0.1 --port 1999 --host 192.0.0.1 --prefiller-hosts 192.0.0.1 192.0.0.1 192.0.0.2 "
            "192.0.0.2 --prefiller-ports 7100 7101 7100 7101 --decoder-hosts 192.0.0.3 192.0.0.4 "
            "--decoder-ports 7100 7100"
        )
    )
    assert len(config.prefillers) == 4 and config.prefillers[3] == Address("192.0.0.2", 7101)


def test_repetitions_and_increments() -> None:
    config = read_config(
        flags(
            "--prefiller-hosts 10.0.0.1 10.0.0.2 --prefiller-hosts-num 2 1 --prefiller-ports 9000 9100 "
            "--prefiller-ports-inc 2 1 --decoder-hosts ::1 --decoder-ports 9000 --decoder-ports-inc 3"
        )
    )
    assert list(map(str, config.prefillers)) == ["10.0.0.1:9000", "10.0.0.1:9001", "10.0.0.2:9100"]
    assert list(map(str, config.decoders)) == ["[::1]:9000", "[::1]:9001", "[::1]:9002"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--prefiller-hosts a b --prefiller-ports 1", "2 --prefiller-hosts but 1 --prefiller-ports"),
        ("--prefiller-hosts a b --prefiller-ports 1 2 3", "one port for each host"),
        ("--decoder-hosts-num 2 2", "one number of at least 1 for each of the 1 --decoder-hosts"),
        ("--decoder-ports 65535 --decoder-ports-inc 2", "beyond port 65535"),
        ("--decoder-hosts a a --decoder-ports 1 1", "name a:1 twice"),
        ("--port 70000", "--port"),
        ("--port eight", "--port"),
        ("--max-retries -1", "--max-retries"),
        ("--workers 0", "--workers"),
        ("--policy least_laod", "did you mean least_load?"),
        ("--prefill-policy asend", "--prefill-policy asend: not one of least_load, ascend"),
        ("--prefill-policy asend", "did you mean ascend?"),
        ("--decode-policy roundrobin", "--decode-policy roundrobin"),
        ("--decode-policy roundrobin", "did you mean round_robin?"),
        ("--contract pul", "did you mean pull?"),
        ("--decoder-hots x", "unknown flag --decoder-hots; did you mean --decoder-host"),
        ("--log-level LOUD", "--log-level"),
        ("--config /nowhere.toml", "cannot read /nowhere.toml"),
        ("foo", "'foo' is not expected here: there are only flags"),
    ],
)
def test_a_wrong_flag_is_one_line(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and said.startswith("pd-proxy: ")


def test_a_file_is_read_and_flags_override_it(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text('port = 9\nprefiller_hosts = ["p"]\nprefill_timeout_s = 7\n')
    config = read_config(["--config", str(path), "--port", "10"])
    assert (config.port, config.prefiller_hosts, config.prefill_timeout_s) == (10, ("p",), 7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "unknown key 'prot'; did you mean port?"),
        ("port = 'x'", "'port'"),
        ("port", "is not TOML"),
        ("drain_timeout_s = 0", "'drain_timeout_s'"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        read_config(["--config", str(path)])


def test_a_role_has_the_policy_of_its_own_flag_or_the_common_one() -> None:
    def policies(line: str) -> tuple[str, str]:
        config = read_config(flags(line))
        return config.policy_of("prefill"), config.policy_of("decode")

    assert policies("") == ("least_load", "least_load")
    assert policies("--policy ascend") == ("ascend", "ascend")
    assert policies("--policy ascend --decode-policy session") == ("ascend", "session")
    assert policies("--prefill-policy prefix_affinity") == ("prefix_affinity", "least_load")


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_config([]).port = 1  # type: ignore[misc]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, says in (("--version", "pd-baton "), ("--help", "--prefiller-ports-inc")):
        with pytest.raises(SystemExit) as caught:
            main([flag])
        assert caught.value.code == 0
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "prefillers", "decoders"),
    [
        ("prefiller_hosts = []", 0, 1),
        ('discover = "k8s"', 0, 0),
        ('discover = "k8s"\ndecoder_hosts = ["a"]', 0, 1),
        ("decoder_hosts = []\ndecoder_ports = []", 1, 0),
    ],
)
def test_a_role_may_begin_empty_where_instances_come_by_themselves(
    tmp_path: Path, text: str, prefillers: int, decoders: int
) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text(text)
    config = read_config(["--config", str(path)])
    assert (len(config.prefillers), len(config.decoders)) == (prefillers, decoders)


def test_ports_without_hosts_are_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text("decoder_hosts = []\ndecoder_ports = [8000]")
    with pytest.raises(ConfigError, match="0 --decoder-hosts but 1 --decoder-ports"):
        read_config(["--config", str(path)])

from __future__ import annotations

import pytest

from sidecar.cli import config_from, main
from sidecar.errors import UsageError

NEEDED = ["--socket", "/tmp/s", "--engine-id", "e"]


def test_every_flag_of_the_command_line() -> None:
    line = "--listen 0.0.0.0:7 --rank 3 --transport shm --metrics-port 9 --advertise-host h --log-level DEBUG"
    config = config_from([*NEEDED, *line.split(), "--exit-on-stdin-eof"])
    assert (config.socket, config.listen, config.engine_id, config.rank) == ("/tmp/s", "0.0.0.0:7", "e", 3)
    assert (config.transport, config.metrics_port, config.advertise_host) == ("shm", 9, "h")
    assert config.log_level == "DEBUG" and config.exit_on_stdin_eof


def test_defaults() -> None:
    config = config_from(NEEDED)
    assert (config.listen, config.transport, config.metrics_port) == ("127.0.0.1:0", "auto", 0)
    assert config.heartbeat_s * 3 == config.claim_ttl_s and config.copy_threads >= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*NEEDED, "--transprot", "shm"], "unknown argument --transprot; did you mean --transport?"),
        ([*NEEDED, "--transprot=shm"], "unknown argument --transprot=shm; did you mean --transport?"),
        ([*NEEDED, "--zzzzzz"], "unknown argument --zzzzzz; see pd-sidecar --help"),
        ([*NEEDED, "--sock", "x"], "unknown argument --sock; did you mean --socket?"),
        ([*NEEDED, "--transport", "carrier"], "--transport: invalid choice: 'carrier'"),
        ([*NEEDED, "--transport", "rdma"], "did you mean --transport mooncake --mooncake-protocol rdma?"),
        ([*NEEDED, "--transport", "mooncak"], "did you mean --transport mooncake?"),
        ([*NEEDED, "--mooncake-protocol", "rmda"], "did you mean --mooncake-protocol rdma?"),
        ([*NEEDED, "--rank", "-1"], "--rank -1: Input should be greater than or equal to 0"),
        ([*NEEDED, "--rank", "one"], "--rank: invalid int value: 'one'"),
        ([*NEEDED, "--metrics-port", "65536"], "--metrics-port 65536"),
        (["--engine-id", "e"], "--socket"),
        (["--engine-id", "e", "--sokcet", "x"], "unknown argument --sokcet; did you mean --socket?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        config_from(arguments)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and said in output.err


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([flag])
    assert ended.value.code == 0
    assert ("pd-baton " if flag == "--version" else "--exit-on-stdin-eof") in capsys.readouterr().out


def test_a_listen_address_that_makes_no_sense_stops_the_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for address in ("nowhere", "abc", "host:", ":1", "h:65536", "h:x"):
        assert main([*NEEDED, "--listen", address]) == 2
        output = capsys.readouterr().err
        assert f"--listen {address}: give it as HOST:PORT" in output and output.count("\n") == 1
    assert main([*NEEDED, "--listen", "0.0.0.0:0"]) == 1
    assert "give --advertise-host" in capsys.readouterr().err

from __future__ import annotations

import pytest

from sidecar.cli import main
from sidecar.config import SidecarConfig
from sidecar.errors import UsageError
from sidecar.taken_ports import check_ports


def config(transport: str = "mooncake", protocol: str = "tcp", listen: int = 9000, metrics: int = 0) -> SidecarConfig:
    return SidecarConfig.model_validate(
        {
            "socket": "s", "engine_id": "e", "transport": transport, "mooncake_protocol": protocol,
            "listen": f"127.0.0.1:{listen}", "metrics_port": metrics,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (config(listen=15000), "--listen: port 15000 is among the 15000-17000 that Mooncake takes"),
        (config(listen=17000), "--listen: port 17000"),
        (config(metrics=16001), "--metrics-port: port 16001"),
        (config("auto", "rdma", listen=15001), "--listen: port 15001"),
        (config("auto", "ascend", listen=20000), "20000-35999 where ADXL listens"),
        (config("mooncake", "ascend", metrics=35999), "--metrics-port: port 35999"),
    ],
)
def test_a_port_of_a_transport_that_is_on_is_refused(asked: SidecarConfig, said: str) -> None:
    with pytest.raises(UsageError, match=r"take one outside, for example 1[789]") as error:
        check_ports(asked, {})
    assert said in str(error.value)


@pytest.mark.parametrize(
    "asked",
    [
        config(listen=14999, metrics=17001), config(listen=0), config("tcp", listen=15000), config("shm", listen=15000),
        config("auto", listen=15000), config("mooncake", "rdma", listen=20001), config("auto", "ascend", listen=36000),
    ],
)  # fmt: skip
def test_other_ports_are_free(asked: SidecarConfig) -> None:
    check_ports(asked, {})


def test_ranges_that_were_moved_are_followed() -> None:
    moved = {"MC_MIN_RPC_PORT": "18000", "MC_MAX_RPC_PORT": "18009", "ASCEND_BASE_PORT": "40000"}
    check_ports(config("mooncake", "ascend", listen=15000, metrics=20001), moved)
    for port in (18000, 18009, 40000, 55999):
        with pytest.raises(UsageError, match=str(port)):
            check_ports(config("mooncake", "ascend", listen=port), moved)


def test_the_command_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--socket", "/tmp/s", "--engine-id", "e", "--transport", "mooncake", "--listen", "127.0.0.1:15500"]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("pd-sidecar: --listen: port 15500 is among") and error.count("\n") == 1

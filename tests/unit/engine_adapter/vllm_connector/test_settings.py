"""What the extra config may say, and what is refused with which remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine_adapter.vllm_connector.settings import (
    ConnectorSettings,
    ConnectorStartError,
    check_ports,
    listen_of,
    settings_from,
    socket_of,
)


def test_nothing_needs_to_be_said() -> None:
    assert settings_from("kv_both", {}) == ConnectorSettings()


def test_a_role_that_agrees_is_taken() -> None:
    assert settings_from("kv_consumer", {"role": "decode", "pull_timeout_s": 5}).pull_timeout_s == 5
    settings_from("kv_both", {"role": "prefill"})


@pytest.mark.parametrize(
    ("kv_role", "extra", "says"),
    [
        ("kv_consumer", {"role": "prefill"}, 'contradicts .* give kv_role "kv_producer"'),
        ("kv_producer", {"role": "both"}, 'give kv_role "kv_both"'),
        ("kv_reader", {}, "kv_producer, kv_consumer, kv_both"),
        ("kv_both", {"role": "prefiller"}, "give prefill, decode or both"),
        ("kv_both", {"leases_s": 3}, "leases_s is not a key .* did you mean lease_s"),
        ("kv_both", {"lease_s": "3"}, "lease_s is '3'"),
        ("kv_both", {"lease_s": True}, "lease_s is True"),
        ("kv_both", {"lease_s": 0}, "above 0"),
        ("kv_both", {"listen": "9000"}, "HOST:PORT"),
        ("kv_both", {"listen": "h:99999"}, "HOST:PORT"),
        ("kv_both", {"metrics_port": 70000}, "metrics_port"),
        ("kv_both", {"memory": "stageing"}, "did you mean staging"),
        ("kv_both", {"staging_bytes": 0}, "at least 1"),
        ("kv_both", {"contract": "layer-wise"}, "none of pull, layerwise; did you mean layerwise"),
        ("kv_both", {"push_timeout_s": 0}, "push_timeout_s must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(kv_role: str, extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConnectorStartError, match=says):
        settings_from(kv_role, extra)


def test_ranks_have_ports_and_sockets_of_their_own() -> None:
    assert listen_of(ConnectorSettings(), 3) == "127.0.0.1:0"
    assert listen_of(ConnectorSettings(listen="10.0.0.1:7000"), 3) == "10.0.0.1:7003"
    sockets = {socket_of(ConnectorSettings(), engine, rank, 0) for engine in ("a", "b") for rank in (0, 1)}
    assert len(sockets) == 4
    assert socket_of(ConnectorSettings(), "a", 0, 0) in sockets  # the same in every process
    assert all(len(str(path)) < 107 for path in sockets)
    assert socket_of(ConnectorSettings(sidecar="/run/s{rank}.sock"), "a", 1, 0) == Path("/run/s1.sock")


@pytest.mark.parametrize(
    ("extra", "num_ranks", "says"),
    [
        ({"transport": "mooncake", "listen": "h:14999"}, 2, "listen: the ports 14999-15000 .* give one from 17001 on"),
        ({"transport": "mooncake", "metrics_port": 17000}, 1, "metrics_port: the ports 17000-17000"),
        ({"listen": "h:65535"}, 2, "go beyond 65535; give at most 65534"),
        ({"listen": "h:9000", "metrics_port": 9003}, 4, "give them 4 ports of distance"),
    ],
)
def test_ports_of_all_ranks_that_cannot_be_had(extra: dict[str, Any], num_ranks: int, says: str) -> None:
    with pytest.raises(ConnectorStartError, match=says):
        check_ports(settings_from("kv_both", extra), num_ranks)


@pytest.mark.parametrize(
    "extra",
    [
        {"transport": "mooncake", "listen": "h:14998", "metrics_port": 17001},
        {"transport": "tcp", "listen": "h:15500"},
        {"transport": "mooncake", "listen": "h:15500", "sidecar": "/somewhere/else.sock"},
        {"listen": "h:9000", "metrics_port": 9002},
        {},
    ],
)
def test_ports_that_are_free(extra: dict[str, Any]) -> None:
    check_ports(settings_from("kv_both", extra), 2)

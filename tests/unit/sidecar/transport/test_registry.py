from __future__ import annotations

import pytest

from sidecar.config import SidecarConfig
from sidecar.copy_executor import CopyExecutor
from sidecar.transport import mooncake
from sidecar.transport.registry import available_transports


@pytest.mark.parametrize(
    ("transport", "protocol", "lacking", "expected"),
    [
        ("auto", "tcp", "", ["shm", "tcp", "mooncake"]),
        ("auto", "rdma", "", ["shm", "mooncake", "tcp"]),
        ("auto", "ascend", "", ["shm", "mooncake", "tcp"]),
        ("auto", "tcp", "no wheel", ["shm", "tcp"]),
        ("auto", "rdma", "no wheel", ["shm", "tcp"]),
        ("shm", "tcp", "", ["shm"]),
        ("tcp", "rdma", "", ["tcp"]),
    ],
)
def test_the_best_comes_first(
    monkeypatch: pytest.MonkeyPatch, transport: str, protocol: str, lacking: str, expected: list[str]
) -> None:
    monkeypatch.setattr(mooncake, "missing", lambda: lacking)
    config = SidecarConfig.model_validate(
        {"socket": "/tmp/s", "engine_id": "e", "transport": transport, "mooncake_protocol": protocol}
    )
    executor = CopyExecutor(1)
    assert list(available_transports(config, executor, "h")) == expected
    executor.close()

from __future__ import annotations

import pytest

from sidecar.transport.contract import common

BOTH = ("shm", "mooncake")


@pytest.mark.parametrize(
    ("ours", "theirs", "same_host", "chosen"),
    [
        (BOTH, BOTH, True, ["shm", "mooncake"]),
        (BOTH, BOTH, False, ["mooncake"]),
        (("shm",), BOTH, True, ["shm"]),
        (("shm",), BOTH, False, []),
        (("mooncake",), BOTH, True, ["mooncake"]),
        (("mooncake",), ("shm",), True, []),
        (("shm", "tcp", "mooncake"), ("shm", "tcp", "mooncake"), True, ["shm", "tcp", "mooncake"]),
        (("shm", "tcp", "mooncake"), ("shm", "tcp"), False, ["tcp"]),
        (("shm", "mooncake", "tcp"), ("shm", "tcp", "mooncake"), False, ["mooncake", "tcp"]),
        (BOTH, ("carrier pigeon",), True, []),
    ],
)
def test_which_transports_two_sidecars_share(
    ours: tuple[str, ...], theirs: tuple[str, ...], same_host: bool, chosen: list[str]
) -> None:
    assert common(ours, theirs, same_host=same_host) == chosen

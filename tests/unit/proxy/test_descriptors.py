"""As many descriptors as there may be, and how many of them the relay thread may have."""

from __future__ import annotations

import resource

import pytest

from proxy.descriptors import raise_descriptor_limit

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "max_lent"),
    [
        (1024, UNLIMITED, 4256, 1000),
        (UNLIMITED, UNLIMITED, None, 1000),
        (4256, 5000, None, 1000),
        (1024, 4255, 4255, 999),
        (1024, 3256, 3256, 500),
        (1024, 2256, 2256, 0),
        (1024, 1024, 1024, 0),
    ],
)
def test_what_is_lent_is_left_over_by_the_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None, max_lent: int
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert raise_descriptor_limit(1000) == max_lent
    assert limits == ([] if raised is None else [(raised, hard)])

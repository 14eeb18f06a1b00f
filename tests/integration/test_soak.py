"""A short soak; `make soak` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.soak import soak

SECONDS, EVERY_S = 50.0, 8.0


@pytest.mark.timeout(400)
async def test_mixed_load_while_parts_are_killed_and_stopped(tiny_model: Path) -> None:
    tally, found = await soak(tiny_model, SECONDS, EVERY_S, seed=3)
    assert not found, (found, tally)
    assert tally.faults.total() >= 2 and tally.counts["right"] >= 20, tally

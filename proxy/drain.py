"""Stopping in good order: no new work, what is in flight ends or is ended at the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_STEP_S = 0.02


async def wait_until(idle: Callable[[], bool], timeout_s: float) -> bool:
    """Whether `idle()` became true within `timeout_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not idle():
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(_STEP_S)
    return True

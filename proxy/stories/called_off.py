"""Ending a leg that nobody waits for any more."""

from __future__ import annotations

import asyncio

from proxy.answer import Answer


async def call_off(*legs: asyncio.Task[Answer] | asyncio.Task[None] | None) -> None:
    """Cancel what still runs and wait until it has closed its connection; an answer that has begun is closed."""
    running = [leg for leg in legs if leg is not None]
    for leg in running:
        leg.cancel()
    if running:
        await asyncio.wait(running)
    for leg in running:
        if leg.cancelled() or leg.exception() is not None:
            continue
        answer = leg.result()
        if isinstance(answer, Answer) and not answer.complete:
            answer.connection.close()

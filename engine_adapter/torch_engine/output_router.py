"""From the engine thread to the coroutines that wait: one hand-over to the event loop a step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from engine_adapter.torch_engine.choice import Choice
from engine_adapter.torch_engine.sequence import RequestOutput


class OutputRouter:
    """Knows which coroutine waits for which engine request. All but `on_outputs` belong to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._routes: dict[str, tuple[Subscription, Choice]] = {}

    @property
    def num_open(self) -> int:
        """Engine requests that somebody waits for."""
        return len(self._routes)

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        """For the engine thread: never waits, whatever the clients do."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the loop is closed: the server has ended, and nobody waits any more
            return

    def open(self, choices: Iterable[Choice]) -> Subscription:
        """Wait for these engine requests; before they are submitted."""
        subscription = Subscription()
        for choice in choices:
            self._routes[choice.engine_request_id] = (subscription, choice)
        return subscription

    def close(self, choices: Iterable[Choice]) -> None:
        for choice in choices:
            self._routes.pop(choice.engine_request_id, None)

    def fail_all(self, error: Exception) -> None:
        """The engine will say nothing more."""
        for subscription, _ in list(self._routes.values()):
            subscription.fail(error)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is not None:
                route[0].put(route[1], output)


class Subscription:
    """The outputs for one HTTP request: bounded by the tokens it may generate, read by one coroutine."""

    __slots__ = ("_error", "_pending", "_waiter")

    def __init__(self) -> None:
        self._pending: list[tuple[Choice, RequestOutput]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    def put(self, choice: Choice, output: RequestOutput) -> None:
        self._pending.append((choice, output))
        self._wake()

    def fail(self, error: Exception) -> None:
        """`next` raises this once what has come already is taken."""
        self._error = error
        self._wake()

    async def next(self) -> list[tuple[Choice, RequestOutput]]:
        """Everything that has come since the last call, at least one output. Raises the error given to `fail`."""
        if not self._pending:
            if self._error is None:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            if not self._pending and self._error is not None:
                raise self._error
        pending, self._pending = self._pending, []
        return pending

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

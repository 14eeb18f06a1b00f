"""One HTTP request's continuations while they run: submitted on entry, given back on exit, however that comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.choice import Choice, ChoiceDelta
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.metrics import ServerMetrics
from engine_adapter.torch_engine.output_router import OutputRouter
from engine_adapter.torch_engine.sequence import EngineRequest, EngineRequestError


@dataclass(slots=True)
class PlannedChoice:
    """A choice and how the engine is asked for it. A `follower` starts once the first choice has a token.

    That is for KV which comes from elsewhere: its lease is read once, by the first choice; the others find the prompt
    in the prefix cache.
    """

    choice: Choice
    engine_request: EngineRequest
    follower: bool = False
    started: bool = False
    last_token_at: float = 0.0
    first_token_at: float = 0.0


class Generation:
    """A reservation of engine requests. Leaving it aborts what still runs and takes back KV nobody was told of."""

    def __init__(
        self,
        engine: Engine,
        router: OutputRouter,
        metrics: ServerMetrics,
        plan: Sequence[PlannedChoice],
        arrived_at: float,
    ) -> None:
        self._engine = engine
        self._router = router
        self._metrics = metrics
        self._plan = {planned.choice.engine_request_id: planned for planned in plan}
        self._arrived_at = arrived_at
        self._num_unfinished = len(self._plan)
        self._delivered = False
        self._loop = asyncio.get_running_loop()

    @property
    def choices(self) -> list[Choice]:
        return [planned.choice for planned in self._plan.values()]

    @property
    def finished(self) -> bool:
        return self._num_unfinished == 0

    def mark_delivered(self) -> None:
        """The whole answer has left: KV offered in it is now the client's business."""
        self._delivered = True

    async def __aenter__(self) -> Generation:
        self._subscription = self._router.open(self.choices)
        try:
            for planned in self._plan.values():
                if not planned.follower:
                    self._start(planned)
        except BaseException:
            self._give_back()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    async def next_deltas(self) -> list[ChoiceDelta]:
        """What the choices got since the last call, at least one entry, one per choice and step.

        Raises ApiError where the engine refuses or loses one of them.
        """
        deltas: list[ChoiceDelta] = []
        while not deltas:
            outputs = await self._subscription.next()
            now = self._loop.time()
            for choice, output in outputs:
                if choice.finish_reason is not None:
                    continue
                if output.error is not None:
                    choice.engine_finished = True
                    raise to_api_error(output.error)
                delta = choice.advance(output)
                self._account(self._plan[choice.engine_request_id], delta, now)
                deltas.append(delta)
        return deltas

    async def run_to_end(self) -> None:
        while not self.finished:
            await self.next_deltas()

    def _start(self, planned: PlannedChoice) -> None:
        try:
            self._engine.submit(planned.engine_request)
        except EngineRequestError as error:
            raise to_api_error(error) from error
        planned.started = True

    def _account(self, planned: PlannedChoice, delta: ChoiceDelta, now: float) -> None:
        choice = planned.choice
        if delta.is_first:
            planned.first_token_at = now
            self._metrics.observe_first_token(now - self._arrived_at)
            self._start_followers()
        elif delta.token_ids:
            self._metrics.observe_token_gap((now - planned.last_token_at) / len(delta.token_ids))
        planned.last_token_at = now
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            if not choice.engine_finished:
                self._engine.abort(choice.engine_request_id)
                choice.engine_finished = True
            self._metrics.observe_finished(
                delta.finish_reason, now - self._arrived_at, len(choice.prompt.token_ids), len(choice.token_ids)
            )

    def _start_followers(self) -> None:
        for planned in self._plan.values():
            if planned.follower and not planned.started:
                self._start(planned)

    def _give_back(self) -> None:
        self._router.close(self.choices)
        for planned in self._plan.values():
            choice = planned.choice
            offered = choice.kv_transfer_params is not None and not self._delivered
            if planned.started and (offered or not choice.engine_finished):
                self._engine.abort(choice.engine_request_id)
                if choice.finish_reason is None:
                    self._metrics.observe_aborted()


def to_api_error(error: EngineRequestError) -> ApiError:
    return ApiError(error.message, status=error.status, error_type=error.error_type)

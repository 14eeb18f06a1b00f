"""The fault table of the contracts other than `pull` (`test_fault_table.py`), a test for every cell.

{contract} x {prefiller, decoder} x what happens to it x {whole, stream} x endpoint. Proxies and engines are in this
process, one set for each contract, leg, endpoint and kind of answer, and all sets go through their cells at the same
time: most of the time of a cell is a time-out. Each test looks at what became of its cell.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from time import monotonic
from typing import Any

import pytest
import uvloop

from bench.mock_faults import Fault
from bench.mock_pairs import P2pNcclInstance
from proxy.drain import wait_until
from proxy.errors import Failure
from proxy.retry import TABLE, Action, Leg
from tests.proxy_blackbox.contracts import CONTRACTS
from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, body_of, text_for
from tests.proxy_blackbox.in_process import InProcess
from tests.proxy_blackbox.test_fault_table import CAUSES, DOWN, MID_CAUSES
from tests.unit.proxy.client import Answer, ask

OTHERS = [one for one in CONTRACTS if one != "pull"]
PATHS = {"completion": COMPLETIONS, "chat": CHAT}
TIMEOUT_S = 2.0
LATE_S = TIMEOUT_S / 4  # a cell in which this process stood still for so long is no evidence, and is tried again
SETTLE_S = 15.0
Cell = tuple[str, Leg, str, bool, str]


@dataclass
class Seen:
    """What became of one cell."""

    answer: Answer
    fields: dict[str, Any]
    failures: list[tuple[str, str, str]]
    prefills: list[int]
    """How many requests each prefiller has read."""
    decodes: list[int]
    left: list[str]
    violations: list[str]
    late_s: float


class Lateness:
    """How late the event loop has been at most since `worst_s` was set."""

    worst_s = 0.0

    async def watch(self) -> None:
        while True:
            due = monotonic() + 0.05
            await asyncio.sleep(0.05)
            self.worst_s = max(self.worst_s, monotonic() - due)


class World(InProcess):
    async def run(self, contract: str, leg: Leg, stream: bool, path: str, found: dict[Cell, Seen]) -> None:
        never = 10_000  # no cell is evidence in the next
        await self.start(
            contract, TIMEOUT_S, connect_timeout_s=TIMEOUT_S / 2, health_interval_s=0.2, policy="round_robin",
            health_max_failures=never, health_max_request_failures=never,
        )  # fmt: skip
        for instance in self.instances:
            if isinstance(instance, P2pNcclInstance):
                instance.evicts_after_s = 1.0
        self.lateness = Lateness()
        watching = asyncio.create_task(self.lateness.watch())
        try:
            for fault in CAUSES:
                fields = body_of(PATHS[path], num_tokens=9, stream=stream, mock={"interval_s": 0.005})
                for _ in range(5):
                    seen = found[contract, leg, fault, stream, path] = await self._cell(leg, fault, fields)
                    if seen.late_s < LATE_S:
                        break
        finally:
            watching.cancel()
            await self.stop()

    async def _cell(self, leg: Leg, fault: str, fields: dict[str, Any]) -> Seen:
        role = [one for one in self.instances if one.role == leg.value]
        path = CHAT if "messages" in fields else COMPLETIONS
        self.lateness.worst_s = 0.0
        self.mocks.ledger.violations.clear()
        for turn in range(8):  # one that is down is met when it is its turn
            await self._break(role, fault, turn // 4)
            failures = Counter(self.app.metrics.retries)
            for instance in self.instances:
                instance.counts.clear()
            answer = await ask(self.port, path, fields)
            await wait_until(lambda: not self.left(), SETTLE_S)
            seen = list((Counter(self.app.metrics.retries) - failures).elements())
            if seen:
                break
        reads = [one.counts["requests"] - self._num_reclaims(one) for one in self.instances]
        told = Seen(
            answer, fields, seen, reads[:2], reads[2:], self.left(), list(self.mocks.ledger.violations),
            self.lateness.worst_s,
        )  # fmt: skip
        for instance in self.instances:
            instance.faults.clear()
            instance.recorded.clear()
            await instance.start()
        await wait_until(lambda: all(one.health.healthy for one in self.app.fleet.all), SETTLE_S)
        return told

    @staticmethod
    def _num_reclaims(instance: Any) -> int:
        ids = [one["headers"].get("x-request-id", "") for one in instance.recorded]
        return sum(one.endswith("-reclaim") for one in ids)

    async def _break(self, role: list[Any], fault: str, number: int) -> None:
        if fault in DOWN:
            for instance in role:
                await instance.start()
            await (role[number].stop if fault == "refused" else role[number].go_deaf)()
            return
        kind, status = fault, 500
        if fault.startswith("status_"):
            kind, status = "status", 422 if fault == "status_4xx" else 500
        shared = Fault(kind, status=status)
        for instance in role:
            instance.faults.clear()
            instance.faults.append(shared)


@pytest.fixture(scope="module")
def found() -> Iterator[dict[Cell, Seen]]:
    seen: dict[Cell, Seen] = {}

    async def all_at_once() -> None:
        sets = product(OTHERS, Leg, [False, True], PATHS)
        async with asyncio.TaskGroup() as group:
            for contract, leg, stream, path in sets:
                group.create_task(World().run(contract, leg, stream, path, seen))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(all_at_once())
    yield seen


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", CAUSES)
@pytest.mark.parametrize("leg", list(Leg))
@pytest.mark.parametrize("contract", OTHERS)
def test_cell(found: dict[Cell, Seen], contract: str, leg: Leg, fault: str, stream: bool, path: str) -> None:
    seen = found[contract, leg, fault, stream, path]
    assert seen.failures, "the fault was not met"
    assert not seen.left and not seen.violations, (seen.left, seen.violations)
    seen_leg, failure, action = seen.failures[0]
    mid = leg is Leg.DECODE and stream and fault in MID_CAUSES
    if (contract, leg, fault) == ("sglang", Leg.DECODE, "hang_before_head"):
        leg = Leg.PREFILL  # which waits for the decoder: nobody can tell which of the two hangs
        assert sorted(seen.prefills) == sorted(seen.decodes) == [1, 1], "both are replaced"
    assert seen_leg == leg.value
    assert Failure(failure) in ((MID_CAUSES[fault],) if mid else CAUSES[fault])
    row = TABLE[leg, Failure(failure)]
    assert action == row.action.value and len(seen.failures) == 1, (seen.failures, seen.late_s)
    check_client(row.action, seen)
    check_places(row.action, seen, contract, fault)


@pytest.mark.parametrize("contract", ["layerwise", "mooncake", "sglang"])
async def test_a_slow_prefill_is_not_held_against_the_decoder_that_waits_for_it(contract: str) -> None:
    """The decoder's own time begins when the prefill has ended, and ends then as it does with `pull`."""
    world = InProcess()
    await world.start(contract, 30.0, first_token_timeout_s=0.7)
    try:
        fields = body_of(CHAT, stream=True, mock={"prefill_s": 1.5})
        answer = await asyncio.wait_for(ask(world.port, CHAT, fields), SETTLE_S)
        assert (answer.status, answer.text) == (200, text_for(fields)) and not world.app.metrics.retries
        world.app.metrics.retries.clear()
        for decoder in world.instances[2:]:
            decoder.faults.append(Fault("hang_mid", consume=True))
        fields = body_of(CHAT)
        answer = await asyncio.wait_for(ask(world.port, CHAT, fields), SETTLE_S)
        assert set(world.app.metrics.retries) >= {("decode", "timeout", "prefill_again")}
        await wait_until(lambda: not world.left(), SETTLE_S)
        assert not world.left()
    finally:
        await world.stop()


def check_client(action: Action, seen: Seen) -> None:
    answer = seen.answer
    if action is Action.PASS_ON:
        assert answer.status == 422 and answer.error["message"]
    else:
        assert (answer.status, answer.complete) == (200, True)
        assert answer.text == text_for(seen.fields)
        assert answer.body.endswith(b"data: [DONE]\n\n") == bool(seen.fields.get("stream"))
        assert b'"error"' not in answer.body


def check_places(action: Action, seen: Seen, contract: str, fault: str) -> None:
    """Who read the request: one that is down never did. Where both legs go at once, one that is called off may have
    read its part or not."""
    prefills, decodes = sorted(seen.prefills), sorted(seen.decodes)
    elsewhere = [0, 1] if fault in DOWN else [1, 1]
    called_off = contract in ("mooncake", "sglang")
    if action is Action.OTHER_PREFILLER:
        assert prefills == elsewhere
        assert sum(decodes) in ((1, 2) if called_off else (1,))
    elif action is Action.OTHER_DECODER:
        assert decodes == elsewhere
        assert sum(prefills) in ((1,) if contract == "layerwise" else (1, 2))
    elif action in (Action.PREFILL_AGAIN, Action.CONTINUE):
        same_again = seen.failures[0][1] == Failure.STALE and decodes == [0, 2]  # which says nothing against it
        assert (decodes == elsewhere or same_again) and sum(prefills) in (1, 2)
    elif action is Action.PASS_ON:
        assert sum(prefills) <= 1 and sum(decodes) <= 1
    else:
        assert action is Action.SAME_INSTANCE and prefills in ([0, 2], [1, 1])

"""{producer, consumer} x {engine, sidecar} x {killed, stopped} x {before the offer, after it, in transfer, after it}.

Four processes, of which one is struck at a time. Each cell says how the transfer ends and by which limits at the
latest; that no byte is wrong, then or later; that it all works again; and that nothing is left over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sidecar.client import CALL_TIMEOUT_S
from tests.sidecar_processes.harness import eventually
from tests.sidecar_processes.stage import (
    ANSWER_TIMEOUT_S,
    CLAIM_TTL_S,
    CONNECT_TIMEOUT_S,
    COPY_BYTES_PER_S,
    DEADLINE_S,
    FENCE_GRACE_S,
    PARTS,
    Stage,
    struck,
)  # fmt: skip

MOMENTS = ("before the offer", "after the offer", "in transfer", "after the transfer")
BLOCKS = list(range(100))
COPY_S = len(BLOCKS) * 8192 / COPY_BYTES_PER_S
SLACK_S = 2.0
"""For a busy machine, on top of every limit."""
UNANSWERED_S = ANSWER_TIMEOUT_S + 2 * CLAIM_TTL_S / 3
"""answer_timeout_s, looked at with every heartbeat, which is a third of claim_ttl_s."""
RIGHT = frozenset({"right"})
PEER_GONE = frozenset({"unreachable", "transport", "timeout"})
VOID = frozenset({"stale_epoch"})


@dataclass(frozen=True)
class Expected:
    """How a pull may end while the fault lasts, and within which time; nothing where nobody is there to pull."""

    ends: frozenset[str] = frozenset()
    within_s: float = 0.0
    then: frozenset[str] = RIGHT
    """How another pull of the same lease may end, after all is well again."""


NOBODY = Expected()
AT_ONCE = {
    ("producer engine", "kill"): Expected(PEER_GONE | VOID, 0.0, VOID),
    ("producer sidecar", "kill"): Expected(PEER_GONE, 0.0, VOID),
    ("consumer engine", "kill"): NOBODY,
    ("consumer sidecar", "kill"): Expected(frozenset({"sidecar_lost"}), 0.0, RIGHT | {"released"}),  # or dropped
    ("producer engine", "stop"): Expected(RIGHT, COPY_S),
    ("producer sidecar", "stop"): Expected(PEER_GONE, UNANSWERED_S + CONNECT_TIMEOUT_S, RIGHT | {"expired"}),
    ("consumer engine", "stop"): NOBODY,
    ("consumer sidecar", "stop"): Expected(frozenset({"sidecar_lost"}), DEADLINE_S + FENCE_GRACE_S),
}
"""What becomes of a pull that is there, or comes, while that part is away."""


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("s"), request.param) as stage:
        assert stage.works()
        yield stage


@pytest.fixture
def settled(stage: Stage) -> Iterator[Stage]:
    """After the fault: it works again, and nothing is held that was not held before."""
    eventually(stage.recovers)
    before = stage.usage()
    yield stage
    eventually(stage.recovers)
    eventually(lambda: not more_than(before, stage.usage()))


def more_than(before: dict[str, int], now: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What there is more of than before. The event loop's own pool of threads may differ by what it has done."""
    spare = {name: 3 if name.endswith("threads") else 0 for name in before}
    return {name: (before[name], now[name]) for name in before if now[name] > before[name] + spare[name]}


@pytest.mark.parametrize(
    ("stage", "how", "moment"),
    [("tcp", how, moment) for how in ("kill", "stop") for moment in MOMENTS] + [("shm", "kill", "in transfer")],
    indirect=["stage"],
)
@pytest.mark.parametrize("part", PARTS)
def test_cell(settled: Stage, part: str, how: str, moment: str) -> None:
    """Over shm only in transfer, as at the other moments no byte moves; test_faults has more of every transport."""
    CELLS[moment](settled, part, how)


def before_the_offer(stage: Stage, part: str, how: str) -> None:
    with struck(stage, part, how) as struck_at:
        if part == "producer engine":
            if how == "stop":  # and its offer comes when it goes on
                stage.engines["p"].say("offer", BLOCKS, 30.0)
                with pytest.raises(AssertionError, match="no answer"):
                    stage.engines["p"].hear(0.3)
        elif part == "producer sidecar":
            assert "error" in stage.offer(BLOCKS)
            assert time.monotonic() - struck_at < (CALL_TIMEOUT_S if how == "stop" else 0) + SLACK_S
        else:
            pull_meanwhile(stage, part, how, stage.offer(BLOCKS))
    if (part, how) == ("producer engine", "stop"):
        source = stage.engines["p"].hear()
        assert stage.pull_ended(stage.pull(source, BLOCKS), COPY_S + SLACK_S) == (True, "")
        assert stage.arrived(BLOCKS, BLOCKS)


def after_the_offer(stage: Stage, part: str, how: str) -> None:
    source = stage.offer(BLOCKS)
    with struck(stage, part, how):
        pull_meanwhile(stage, part, how, source)


def pull_meanwhile(stage: Stage, part: str, how: str, source: dict[str, object]) -> None:
    """Pull while `part` is away, if there is anybody to do it; afterwards, where the lease still is, with success."""
    expected = AT_ONCE[part, how]
    pool = stage.pools["d"]
    pool.fill(0)
    if expected.ends:
        judge(stage, stage.pull(source, BLOCKS), expected, time.monotonic())
        if expected.ends != RIGHT:
            assert pool.is_all(0)
    go_on(stage, expected, source)


def in_transfer(stage: Stage, part: str, how: str) -> None:
    expected, pool = AT_ONCE[part, how], stage.pools["d"]
    source = stage.offer(BLOCKS)
    pool.fill(0)
    pull_id = stage.pull(source, BLOCKS)
    eventually(lambda: any(pool.bytes[:: stage.pools["d"].layout.block_bytes // 2]))
    with struck(stage, part, how) as struck_at:
        if part != "consumer engine":
            judge(stage, pull_id, expected, struck_at)
        elif how == "kill":  # nobody hears, but the blocks are its sidecar's no more
            eventually(lambda: stage.sidecars["d"].usage()[2] == 0, SLACK_S)
        else:  # the sidecar goes on by itself
            eventually(lambda: stage.arrived(BLOCKS, BLOCKS), COPY_S + SLACK_S)
        if expected.ends != RIGHT and (part, how) != ("consumer engine", "stop"):
            pool.fill(42)
    if (part, how) == ("consumer engine", "stop"):
        assert stage.pull_ended(pull_id, SLACK_S) == (True, "")
    elif expected.ends != RIGHT:
        time.sleep(0.3)
        assert pool.is_all(42), "a byte came after the failure had been reported"
        go_on(stage, expected, source)


def after_the_transfer(stage: Stage, part: str, how: str) -> None:
    source, pool = stage.offer(BLOCKS[:8]), stage.pools["d"]
    pool.fill(0)
    pull_id = stage.pull(source, BLOCKS[:8])
    assert stage.pull_ended(pull_id, SLACK_S) == (True, "")
    was = pool.bytes[:]
    with struck(stage, part, how):
        time.sleep(0.2)
        assert pool.bytes[:] == was and stage.arrived(BLOCKS[:8], BLOCKS[:8])
    stage.restore()
    ok, reason = stage.pull_ended(stage.pull(source, BLOCKS[:8]), DEADLINE_S + SLACK_S)
    assert (ok, reason) == (False, "stale_epoch" if (part, how) in VOIDING else "released")
    assert pool.bytes[:] == was


VOIDING = {("producer engine", "kill"), ("producer sidecar", "kill")}
CELLS = dict(zip(MOMENTS, (before_the_offer, after_the_offer, in_transfer, after_the_transfer), strict=True))


def judge(stage: Stage, pull_id: str, expected: Expected, struck_at: float) -> None:
    ok, reason = stage.pull_ended(pull_id, struck_at + expected.within_s + SLACK_S - time.monotonic())
    assert ("right" if ok else reason) in expected.ends
    if ok:
        assert stage.arrived(BLOCKS, BLOCKS)


def go_on(stage: Stage, expected: Expected, source: dict[str, object]) -> None:
    """All is put back: the same lease can be read, or is refused if its producer died."""
    stage.restore()
    if expected.ends == RIGHT:
        return
    judge(stage, stage.pull(source, BLOCKS), Expected(expected.then, DEADLINE_S), time.monotonic())
    stage.engines["p"].ask("revoke", source["transfer_id"])

"""The engines of the policy simulator take as long as their constants say."""

from __future__ import annotations

from functools import partial

import pytest

from bench import simulated_fleet as fleet
from bench.simulated_fleet import Clock, Decoder, Prefiller, compute_s
from bench.simulated_requests import CHUNK_TOKENS, Request
from proxy.scheduling import Prefix
from proxy.scheduling.cost import Cost


def request(prompt_tokens: int, output_tokens: int = 10, keys: tuple[int, ...] = ()) -> Request:
    return Request(0.0, prompt_tokens, output_tokens, Cost(1, 1, 1), 1, b"", Prefix(keys, CHUNK_TOKENS))


class Log:
    """What was told, and when."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ends: list[tuple[Request, bool, float]] = []
        self.firsts: list[float] = []

    def told(self, one: Request, well: bool) -> None:
        self.ends.append((one, well, self.clock.now))

    def first(self) -> None:
        self.firsts.append(self.clock.now)


def prefilled(slowness: float, *requests: Request) -> list[float]:
    clock = Clock()
    log, prefiller = Log(clock), Prefiller(clock, slowness)
    for one in requests:
        prefiller.send(one, log.told)
    clock.run()
    assert [end[:2] for end in log.ends] == [(one, True) for one in requests]
    return [end[2] for end in log.ends]


def test_a_prompt_takes_its_tokens_and_its_steps() -> None:
    budget, step_s = fleet.PREFILL_STEP_TOKENS, fleet.PREFILL_STEP_S
    assert prefilled(1.0, request(1000)) == [pytest.approx(step_s + compute_s(0, 1000))]
    assert prefilled(2.0, request(1000)) == [pytest.approx(2 * (step_s + compute_s(0, 1000)))]
    assert prefilled(1.0, request(budget + 1)) == [pytest.approx(2 * step_s + compute_s(0, budget + 1))]


def test_prompts_that_wait_share_a_step() -> None:
    step_s, one_s = fleet.PREFILL_STEP_S, compute_s(0, 1000)
    first, *rest = prefilled(1.0, request(1000), request(1000), request(1000))
    assert first == pytest.approx(step_s + one_s)
    assert rest == [pytest.approx(2 * step_s + 3 * one_s)] * 2


def test_a_cached_prefix_is_not_computed_again() -> None:
    clock = Clock()
    log, prefiller = Log(clock), Prefiller(clock, 1.0)
    for when in (0.0, 10.0):
        clock.at(when, partial(prefiller.send, request(4 * CHUNK_TOKENS, keys=(1, 2, 3)), log.told))
    clock.run()
    took = [log.ends[0][2], log.ends[1][2] - 10.0]
    assert took[0] == pytest.approx(fleet.PREFILL_STEP_S + compute_s(0, 4 * CHUNK_TOKENS))
    assert took[1] == pytest.approx(fleet.PREFILL_STEP_S + compute_s(3 * CHUNK_TOKENS, CHUNK_TOKENS))


def step_s(num_streams: int, kv_tokens: int) -> float:
    return fleet.DECODE_STEP_S + num_streams * fleet.DECODE_STREAM_S + kv_tokens * fleet.DECODE_KV_TOKEN_S


def test_a_lone_stream_takes_its_steps() -> None:
    clock = Clock()
    log, decoder = Log(clock), Decoder(clock, 1.0)
    decoder.send(request(1000, 100), log.first, log.told)
    clock.run()
    pulled = fleet.TRANSFER_S + 1000 * fleet.TRANSFER_TOKEN_S
    assert log.firsts == [pytest.approx(pulled + step_s(1, 1000))]
    ((_, well, ended),) = log.ends
    assert well and 100 * step_s(1, 1000) < ended - pulled < 100 * step_s(1, 1100)


def test_a_stream_joins_between_two_steps_and_slows_both_down() -> None:
    clock = Clock()
    log, decoder = Log(clock), Decoder(clock, 1.0)
    decoder.send(request(1000, 200), log.first, log.told)
    clock.at(1.0, lambda: decoder.send(request(1000, 50), log.first, log.told))
    clock.run()
    pulled = 1.0 + fleet.TRANSFER_S + 1000 * fleet.TRANSFER_TOKEN_S
    assert step_s(2, 2000) < log.firsts[1] - pulled < 2.1 * step_s(2, 2100)  # the rest of a step, and one more
    second, first = log.ends
    assert second[0].output_tokens == 50 and first[0].output_tokens == 200
    assert second[2] - pulled > 50 * step_s(2, 2000)


def test_a_stream_waits_for_room() -> None:
    clock = Clock()
    log, decoder = Log(clock), Decoder(clock, 1.0)
    for _ in range(2):
        decoder.send(request(fleet.DECODE_KV_TOKENS - 100, 50), log.first, log.told)
    clock.run()
    assert len(log.ends) == 2 and log.firsts[1] > log.ends[0][2]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_who_crashes_loses_all_it_has_and_says_so_once(role: str) -> None:
    clock = Clock()
    log = Log(clock)
    engine: Prefiller | Decoder = Prefiller(clock, 1.0) if role == "prefill" else Decoder(clock, 1.0)
    sent = [request(20_000, 500) for _ in range(8)]
    for one in sent:
        if isinstance(engine, Prefiller):
            engine.send(one, log.told)
        else:
            engine.send(one, log.first, log.told)
    clock.at(0.3, engine.crash)
    clock.run()
    assert sorted(map(id, sent)) == sorted(id(one) for one, _, _ in log.ends)
    assert not any(well for _, well, _ in log.ends) and engine.down

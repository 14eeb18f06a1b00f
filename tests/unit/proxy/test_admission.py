"""Admission over real sockets: a decoder's place comes before the prefill, and who finds none waits or is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.capacity import kv_tokens_of, num_waiting_of
from proxy.drain import wait_until
from proxy.load_ledger import InstanceLoad
from tests.unit.proxy.client import CHAT, COMPLETIONS, Answer, Client, ask, fields_of
from tests.unit.proxy.conftest import Setup, Start

CACHE_INFO = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="%s",engine="%d"} 1.0\n'


async def full(start: Start, **config: Any) -> tuple[Setup, asyncio.Event, asyncio.Task[Answer]]:
    """A proxy whose one decoder takes one request at a time, and that one in the middle of its stream."""
    setup = await start(1, 1, decoder_max_streams=1, **config)
    setup.d.gate = gate = asyncio.Event()
    setup.p.gate = None
    first = asyncio.create_task(ask(setup.port, CHAT, fields_of(CHAT, stream=True)))
    assert await wait_until(lambda: len(setup.d.requests) == 1, 5)
    return setup, gate, first


def queued(setup: Setup, count: int) -> Any:
    return wait_until(lambda: setup.app.num_waiting() == count, 5)


async def test_a_request_waits_for_room_and_its_prompt_is_not_prefilled_meanwhile(start: Start) -> None:
    setup, gate, first = await full(start)
    second = asyncio.create_task(ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS)))
    assert await queued(setup, 1)
    assert len(setup.p.requests) == 1
    gate.set()
    assert (await first).status == (await second).status == 200
    assert len(setup.p.requests) == 2
    await setup.settled()


async def test_beyond_the_queue_429_and_after_the_deadline_503(start: Start) -> None:
    setup, gate, first = await full(start, max_queued_requests=1, queue_timeout_s=0.5)
    second = asyncio.create_task(ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS)))
    assert await queued(setup, 1)
    third = await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    late = await second
    assert (third.status, late.status) == (429, 503)
    for answer in (third, late):
        assert int(answer.headers["retry-after"]) >= 1
    gate.set()
    assert (await first).status == 200
    await setup.settled()


async def test_a_client_that_leaves_the_queue_leaves_nothing(start: Start) -> None:
    setup, gate, first = await full(start)
    leaver = await Client.connect(setup.port)
    task = asyncio.create_task(leaver.post(COMPLETIONS, fields_of(COMPLETIONS)))
    assert await queued(setup, 1)
    leaver.close()
    assert await queued(setup, 0)
    gate.set()
    await asyncio.gather(first, task, return_exceptions=True)
    assert len(setup.p.requests) == 1
    await setup.settled()


async def test_priority_and_fairness_decide_who_is_next(start: Start) -> None:
    setup, gate, first = await full(start)
    tasks = []
    for key, name, priority in (
        ("flood", "f0", 0), ("flood", "f1", 0), ("flood", "f2", 0), ("other", "o0", 0), ("other", "urgent", -1),
    ):  # fmt: skip
        fields = fields_of(COMPLETIONS, user=name, priority=priority)
        tasks.append(asyncio.create_task(ask(setup.port, COMPLETIONS, fields, Authorization=f"Bearer {key}")))
        assert await queued(setup, len(tasks))
    gate.set()
    await asyncio.gather(first, *tasks)
    assert [one.fields["user"] for one in setup.p.requests[1:]] == ["urgent", "f0", "o0", "f1", "f2"]
    await setup.settled()


async def test_a_decoder_with_room_is_preferred_to_a_less_loaded_one_without(start: Start) -> None:
    setup = await start(1, 2, decoder_kv_tokens=4000)
    small, large = setup.app.fleet.members[next(role for role in setup.app.fleet.members if role == "decode")]
    busy = small.load.reserve(1, 3999)
    assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200
    assert large.load.total_requests == 1
    busy.release()
    await setup.settled()


async def test_capacity_is_read_from_the_decoders_metrics(start: Start) -> None:
    setup = await start(1, 1, capacity_interval_s=0.05, decoder_kv_overcommit=1.5)
    setup.d.exposition = (CACHE_INFO % ("100", 0)).encode()
    load = setup.app.fleet.all[-1].load
    assert await wait_until(lambda: load.max_kv_tokens == 2400, 5)


async def test_short_prompts_are_left_to_the_decoder(start: Start) -> None:
    setup = await start(min_remote_prefill_tokens=100)
    assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200
    assert not setup.p.requests
    assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, prompt="word " * 200))).status == 200
    assert len(setup.p.requests) == 1
    assert setup.app.metrics.recomputes["short_prompt"] == 1


@pytest.mark.parametrize(
    ("exposition", "kv_tokens"),
    [
        ((CACHE_INFO % ("100", 0)).encode(), 1600),
        ((CACHE_INFO % ("100", 0) + "other 1\n" + CACHE_INFO % ("50", 1)).encode(), 2400),
        ((CACHE_INFO % ("None", 0)).encode(), None),
        (b"# HELP vllm:cache_config_info x\n", None),
        (b"", None),
    ],
)
def test_the_pools_size_is_read_off_an_exposition(exposition: bytes, kv_tokens: int | None) -> None:
    assert kv_tokens_of(exposition) == kv_tokens


@pytest.mark.parametrize(
    ("exposition", "num_waiting"),
    [
        (b"vllm:num_requests_waiting 3.0\n", 3),
        (b'a 1\nvllm:num_requests_waiting{engine="0"} 2.0\nvllm:num_requests_waiting{engine="1"} 1e1\n', 12),
        (b'sglang:num_queue_reqs{model_name="m"} 5.0\n', 5),
        (b'vllm:num_requests_waiting_by_reason{reason="capacity"} 7.0\n', None),
        (b"", None),
    ],
)
def test_an_engines_own_queue_is_read_off_an_exposition(exposition: bytes, num_waiting: int | None) -> None:
    assert num_waiting_of(exposition) == num_waiting


async def test_the_queues_of_both_roles_are_read(start: Start) -> None:
    setup = await start(1, 1, capacity_interval_s=0.05, decoder_kv_tokens=100)
    setup.p.exposition, setup.d.exposition = b"vllm:num_requests_waiting 4.0\n", b"vllm:num_requests_waiting 2.0\n"
    assert await wait_until(lambda: [one.num_waiting for one in setup.app.fleet.all] == [4, 2], 5)
    setup.d.exposition = b"other 1\n"
    assert await wait_until(lambda: setup.app.fleet.all[1].num_waiting is None, 5)
    assert setup.app.fleet.all[1].load.max_kv_tokens == 100


def test_an_idle_instance_takes_what_is_larger_than_itself() -> None:
    load = InstanceLoad()
    load.max_kv_tokens = 100
    assert load.has_room(1000)
    held = load.reserve(1, 60)
    assert load.has_room(40) and not load.has_room(41)
    held.release()
    assert load.kv_tokens == 0

"""Prefillers that share a directory: what one has computed the other loads, and what is no good is computed again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vllm.servers import BLOCK_SIZE, Ask, Server, baton, eventually, post, proxy_server, running, vllm_server
from tests.vllm.splits import by_source, prompt, used

pytestmark = pytest.mark.timeout(900)


@dataclass
class Sharing:
    """Two prefillers, the directory between them, and a vLLM without any of it."""

    first: Server
    second: Server
    directory: Path
    unsplit: Server
    proxy: Server
    """Prefills on the second, decodes on the first."""


@pytest.fixture(scope="module")
def sharing(model: Path, unsplit: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    logs, directory = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("store") / "kv"
    store = {"dir": str(directory), "dir_bytes": "1GiB"}
    first, second = (
        vllm_server(
            f"storing-{role}", model, logs,
            {**baton(role, lease_s=20, log_level="DEBUG", store=store), "kv_load_failure_policy": "recompute"},
        )
        for role in ("kv_both", "kv_producer")
    )  # fmt: skip
    proxy = proxy_server([second], [first], logs)
    with running(first, second), running(proxy):
        yield Sharing(first, second, directory, unsplit, proxy)


def blocks_in(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*/*/*") if path.is_file() and path.parent.name != "tmp"]


def settle(sharing: Sharing) -> None:
    """Until the first has written what it computed: nothing is held, and files come no more."""
    seen: list[int] = []

    def steady() -> bool:
        seen.append(len(blocks_in(sharing.directory)))
        return used(sharing.first) == 0 and len(seen) > 5 and len(set(seen[-5:])) == 1

    assert eventually(steady, 60)


def loaded(sharing: Sharing) -> float:
    return by_source(sharing.second, "external_kv_transfer")


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_prefiller_loads_what_another_has_computed(sharing: Sharing, chat: bool) -> None:
    for number, length in enumerate((3, 60, 150, 400)):
        ask = Ask(prompt(length, 9700 + 10 * chat + number), chat=chat)
        want = ask.text(sharing.unsplit)
        assert ask.text(sharing.first) == want
        settle(sharing)
        before = loaded(sharing)
        assert ask.text(sharing.second) == want
        tokens = loaded(sharing) - before
        assert tokens % BLOCK_SIZE == 0 and (tokens > 0 or length == 3)
    assert eventually(lambda: used(sharing.second) == 0)


def test_a_longer_prompt_loads_its_beginning_and_is_handed_on(sharing: Sharing) -> None:
    begin = prompt(200, 9750)
    assert Ask(begin).text(sharing.first) == Ask(begin).text(sharing.unsplit)
    settle(sharing)
    before = loaded(sharing)
    seeds = iter(range(9751, 9760))

    def handed_on() -> bool:  # not where a busy machine's sidecars don't reach each other in time: then it is computed
        longer = Ask(f"{begin} and then {prompt(140, next(seeds))}")
        assert longer.text(sharing.proxy) == longer.text(sharing.unsplit)
        return by_source(sharing.first, "external_kv_transfer") > 0  # of the rest, which only the second has computed

    assert handed_on() or handed_on() or handed_on()
    assert loaded(sharing) > before
    assert eventually(lambda: used(sharing.first) == 0 and used(sharing.second) == 0, 60)


def test_a_cache_salt_keeps_blocks_apart(sharing: Sharing) -> None:
    text = prompt(100, 9760)
    body = Ask(text).body()
    assert post(sharing.first, "/v1/completions", {**body, "cache_salt": "one tenant"})[0] == 200
    settle(sharing)
    before = loaded(sharing)
    for others in ({}, {"cache_salt": "another"}):
        assert post(sharing.second, "/v1/completions", {**body, **others})[0] == 200
    assert loaded(sharing) == before
    assert post(sharing.second, "/v1/completions", {**body, "cache_salt": "one tenant"})[0] == 200
    assert loaded(sharing) > before


def test_a_torn_file_is_computed_again(sharing: Sharing) -> None:
    known = set(blocks_in(sharing.directory))
    ask = Ask(prompt(300, 9770))
    want = ask.text(sharing.unsplit)
    assert ask.text(sharing.first) == want
    settle(sharing)
    written = sorted(set(blocks_in(sharing.directory)) - known)
    assert len(written) > 4
    whole = written[0].stat().st_size
    torn = written[len(written) // 2]
    torn.write_bytes(torn.read_bytes()[:-100])
    before = loaded(sharing)
    assert ask.text(sharing.second) == want
    assert 0 <= loaded(sharing) - before < len(written) * BLOCK_SIZE
    assert eventually(lambda: torn.exists() and torn.stat().st_size == whole)  # written anew by the second
    assert eventually(lambda: used(sharing.second) == 0)


def test_a_sidecar_that_dies_costs_no_answer(sharing: Sharing) -> None:
    """Not of a request that comes while it is away."""
    ask = Ask(prompt(150, 9780))
    want = ask.text(sharing.unsplit)
    assert ask.text(sharing.first) == want
    settle(sharing)
    os.kill(sharing.second.sidecar_pid(), signal.SIGKILL)
    assert ask.text(sharing.second) == want
    assert eventually(lambda: used(sharing.second) == 0, 60)

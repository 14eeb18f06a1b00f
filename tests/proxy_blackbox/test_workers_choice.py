"""`--workers 2`: which decoder is chosen is up to what all workers do together."""

from __future__ import annotations

import json
import random
import socket
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    HOST,
    Engines,
    Proxy,
    body_of,
    eventually,
    raw_post,
)
from tests.proxy_blackbox.workers import Clients, ask, served, worker_of, workers

StartProxy = Callable[..., Proxy]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Engines]:
    started = Engines(2, 4)
    yield started
    started.process.stop()


def spread(proxy: Proxy, engines: Engines, num_clients: int = 6, num_each: int = 25) -> float:
    """The coefficient of variation of requests per decoder. All are alike, so that the decoders show one speed."""
    engines.reset()

    def client() -> None:
        with closing(socket.create_connection((HOST, proxy.port), timeout=30)) as sock:
            for _ in range(num_each):
                assert ask(sock, num_tokens=8, stream=True, mock={"interval_s": 0.001}).status == 200

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    counts = served(engines)
    assert sum(counts.values()) == num_clients * num_each
    return statistics.pstdev(counts.values()) / statistics.mean(counts.values())


def test_the_choice_is_as_even_with_two_workers_as_with_one(start_proxy: StartProxy, engines: Engines) -> None:
    """At a busy moment a decoder is measured at less than it does, and left out for a while: then once more."""
    one, two = start_proxy("--workers", "1"), start_proxy("--workers", "2")
    for proxy in (one, two):
        spread(proxy, engines, num_each=10)  # until their speeds are known
    tries: list[tuple[float, float]] = []
    while not any(max(pair) <= 0.15 for pair in tries):
        assert len(tries) < 8, tries
        tries.append((spread(one, engines), spread(two, engines)))
    with Clients(two):
        pass  # both take connections


def test_two_workers_choose_as_one_does(start_proxy: StartProxy, engines: Engines) -> None:
    """Of streams that begin and end one after the other, short and long, whichever worker has them."""
    rng = random.Random(7)
    order = [(rng.randrange(2), rng.choice((10, 80_000, 400_000)), rng.random() < 0.4) for _ in range(24)]
    one, two = (choices(start_proxy("--workers", num), engines, order) for num in "12")
    assert one == two
    assert len(set(one)) == 4


def choices(proxy: Proxy, engines: Engines, order: list[tuple[int, int, bool]]) -> list[int]:
    """The decoders of requests with a prompt of so many characters, each in one of two workers; before some, the
    oldest one ends. None gets a token, so that no decoder shows a speed."""
    chosen: list[int] = []
    streams: list[socket.socket] = []
    with ExitStack() as stack:
        pids = [one.pid for one in workers(proxy)]
        for worker, num_characters, ends_one in order:
            if ends_one and streams:
                streams.pop(0).close()
            eventually(lambda: num_streams(proxy) != len(streams), "the proxy has not heard of its end")
            before = num_sent(engines)
            sock = stack.enter_context(closing(socket.create_connection((HOST, proxy.port), timeout=20)))
            while pids and worker_of(proxy, sock) != pids[worker]:
                sock = stack.enter_context(closing(socket.create_connection((HOST, proxy.port), timeout=20)))
            fields = body_of(CHAT, "x" * num_characters, stream=True, mock={"interval_s": 60})
            sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
            streams.append(sock)
            eventually(lambda: num_sent(engines) == before, "no decoder has it", 20)  # noqa: B023
            (port,) = num_sent(engines) - before
            chosen.append(engines.decode.index(port))
    return chosen


def num_sent(engines: Engines) -> Counter[int]:
    return Counter(
        {
            one["port"]: one["counts"].get("decodes", 0)
            for one in engines.state()["instances"]
            if one["role"] == "decode"
        }
    )


def num_streams(proxy: Proxy) -> int:
    return sum(one["load"]["num_requests"] for one in proxy.get("/instances").json["instances"])

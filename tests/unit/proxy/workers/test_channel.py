"""Workers' ends and the parent's, over real sockets; the parent in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.drain import wait_until
from proxy.errors import ProxyError
from proxy.workers.broker import Broker
from proxy.workers.child import Child
from proxy.workers.frames import Message
from proxy.workers.peers import Peers


class Parent:
    """What the supervisor does with its channels."""

    def __init__(self, num: int) -> None:
        self.selector = selectors.DefaultSelector()
        self.children = {number: Child(number) for number in range(num)}
        self.broker = Broker(self.children, self.selector)
        self.told: list[Message] = []
        self.ends: list[socket.socket] = []
        for child in self.children.values():
            ours, theirs = socket.socketpair()
            child.began(1, ours, 0.0)
            self.selector.register(ours, selectors.EVENT_READ, child)
            theirs.setblocking(False)
            self.ends.append(theirs)
        self._woken, self._waker = os.pipe()
        self.selector.register(self._woken, selectors.EVENT_READ, None)
        self._todo: list[Any] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            for key, events in self.selector.select():
                if key.data is None:
                    if os.read(self._woken, 1) == b"x":
                        return
                    self._todo.pop(0)()
                else:
                    self.told += self.broker.exchange(key.data, events)

    def do(self, act: Any) -> None:
        self._todo.append(act)
        os.write(self._waker, b".")

    def stop(self) -> None:
        os.write(self._waker, b"x")
        self._thread.join(5)
        for child in self.children.values():
            child.ended()
        self.selector.close()
        for one in (self._woken, self._waker):
            os.close(one)


@pytest.fixture
async def parent() -> AsyncIterator[Parent]:
    made = Parent(3)
    yield made
    made.stop()


@pytest.fixture
async def peers(parent: Parent) -> AsyncIterator[list[Peers]]:
    made = [Peers(number, end, asyncio.get_running_loop()) for number, end in enumerate(parent.ends)]
    for one in made:
        await one.connect()
    yield made
    for one in made:
        one.close()
    await asyncio.sleep(0)


def answers(one: Peers) -> None:
    async def double(fields: Any, body: bytes) -> tuple[Any, bytes]:
        if fields == "refuse":
            raise ProxyError(409, "It is refused.")
        if fields == "break":
            raise ZeroDivisionError
        if fields == "wait":
            await asyncio.sleep(60)
        return [one.worker, fields], body * 2

    one.handlers["double"] = double
    one.serve()


async def test_all_others_are_asked_and_all_answers_come_back(peers: list[Peers]) -> None:
    for one in peers:
        answers(one)
    big = os.urandom(3 << 20)  # more than a socket takes at once
    replies = await peers[1].ask("double", {"x": 1}, big)
    assert [(one.worker, one.error, one.fields) for one in replies.of] == [
        (0, "", [0, {"x": 1}]),
        (2, "", [2, {"x": 1}]),
    ]
    assert all(one.body == big * 2 for one in replies.of) and not replies.failed
    at_once = await asyncio.gather(*(one.ask("double", number) for number, one in enumerate(peers * 20)))
    for number, found in enumerate(at_once):
        assert {tuple(one.fields) for one in found.of} == {(w, number) for w in range(3) if w != number % 3}
    only = await peers[0].ask("double", 5, to=[2])
    assert [one.worker for one in only.of] == [2]
    assert (await peers[0].ask("double", 5, to=[9])).of == []


async def test_who_refuses_breaks_or_is_silent_is_named(peers: list[Peers], caplog: pytest.LogCaptureFixture) -> None:
    for one in peers:
        answers(one)
    refused = await peers[0].ask("double", "refuse")
    assert refused.failed == {1: "It is refused.", 2: "It is refused."} and refused.of[0].fields == 409
    assert "ZeroDivision" in caplog.text or "internal error" in (await peers[0].ask("double", "break")).failed[1]
    assert (await peers[0].ask("nothing")).failed[1] == "Worker 1 doesn't know 'nothing'."
    late = await peers[0].ask("double", "wait", timeout_s=0.1)
    assert late.failed == dict.fromkeys((1, 2), "no answer in time")


async def test_what_is_asked_before_a_worker_serves_waits_for_it(peers: list[Peers]) -> None:
    async def early(_: Any, __: bytes) -> tuple[Any, bytes]:
        raise ProxyError(503, "it is only just starting")

    for one in peers[:2]:
        answers(one)
    peers[2].early["snapshot"] = early
    asking = asyncio.create_task(peers[0].ask("double", 1))
    assert (await peers[1].ask("snapshot", to=[2])).failed == {2: "it is only just starting"}
    assert not asking.done()
    answers(peers[2])
    assert not (await asking).failed


async def test_a_worker_that_dies_is_answered_for(peers: list[Peers], parent: Parent) -> None:
    for one in peers:
        answers(one)
    asking = asyncio.create_task(peers[0].ask("double", "wait", to=[1]))
    assert await wait_until(lambda: bool(parent.children[1].owes), 5)
    parent.do(lambda: parent.broker.ended(parent.children[1]))
    assert (await asyncio.wait_for(asking, 5)).failed == {1: "worker 1 has ended"}
    await asyncio.wait_for(peers[1].parent_is_gone.wait(), 5)
    assert [one.worker for one in (await peers[0].ask("double", 2)).of] == [2]


async def test_the_parent_keeps_the_metrics_that_pass_it_and_hears_what_it_is_told(
    peers: list[Peers], parent: Parent
) -> None:
    async def exposition(_: Any, __: bytes) -> tuple[Any, bytes]:
        return None, b'[["a","counter","",[["a_total",{},2.0]]]]'

    for one in peers:
        one.handlers["metrics"] = exposition
        one.serve()
    await peers[0].ask("metrics", None, b"[]")
    parent.do(lambda: parent.broker.ended(parent.children[1]))
    replies = await peers[0].ask("metrics", None, b"[]")
    while not replies.parent.startswith(b'[[["a"'):  # until the parent has noticed
        replies = await peers[0].ask("metrics", None, b"[]")
    peers[2].tell_parent("ready")
    assert await wait_until(lambda: bool(parent.told), 5)
    assert [(one.call, one.sender) for one in parent.told] == [("ready", 2)]


async def test_a_silent_parent_is_named() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    alone = Peers(0, ours, asyncio.get_running_loop())
    await alone.connect()
    assert (await alone.ask("double", timeout_s=0.05)).failed == {-1: "the parent process does not answer"}
    theirs.close()
    await asyncio.wait_for(alone.parent_is_gone.wait(), 5)
    alone.close()
    await asyncio.sleep(0)

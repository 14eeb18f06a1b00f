"""The client against a scripted sidecar on a real unix socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar import client as client_module
from sidecar import protocol
from sidecar.client import SidecarClient
from sidecar.errors import LayoutRefused, OfferRefused, SidecarError, SidecarUnavailable, VersionMismatch
from sidecar.framing import FrameDecoder, encode_frame
from sidecar.protocol import (
    CallFailed,
    EngineHello,
    KvLayout,
    Message,
    Offer,
    OfferBlocks,
    OfferEnded,
    Plane,
    PoolRegistered,
    Pull,
    PullEnded,
    PullSource,
    Refused,
    RegisterPool,
    SidecarHello,
    SidecarLost,
    decode,
    encode,
)

HELLO = SidecarHello("e", 0, "127.0.0.1", 7, ("shm",), "epoch", protocol.PROTOCOL_VERSION)
HELLO_OF_ANOTHER = SidecarHello("e", 0, "h", 1, (), "", 99)
SOURCE = PullSource("h", 1, "p", "t", "s", "ep", 1)
LAYOUT = KvLayout(1, 16, (Plane(0, 8, 8),), 1, 1, 1, "float32", "m", "o")


def ended(pull_id: str, ok: bool = True) -> PullEnded:
    return PullEnded(pull_id, ok, "" if ok else "expired", "", 1, 8, 0.1, "shm", "p@h:1")


class Script:
    """The sidecar's end: `answer` is called for each message and says what to send back."""

    def __init__(self, path: str, hello: Message, answer: Callable[[Message], list[Message]]) -> None:
        self.heard: list[Message] = []
        self.fds: list[int] = []
        self._hello, self._answer = hello, answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        self._listener.close()
        decoder = FrameDecoder(1 << 20)
        with sock:
            while True:
                chunk, fds, _, _ = socket.recv_fds(sock, 65536, 4)
                self.fds += fds
                if not chunk:
                    return
                for frame in decoder.feed(chunk):
                    message = decode(protocol.from_engine, frame)
                    self.heard.append(message)
                    answers = [self._hello] if isinstance(message, EngineHello) else self._answer(message)
                    if answers:
                        sock.sendall(b"".join(encode_frame(encode(answer)) for answer in answers))
                    if any(isinstance(answer, Refused) for answer in answers):
                        return  # the script's word for "die"

    def join(self) -> None:
        self._thread.join(10)
        for fd in self.fds:
            os.close(fd)


Open = Callable[..., tuple[SidecarClient, Script]]


@pytest.fixture
def open_client(tmp_path: Path) -> Iterator[Open]:
    opened: list[tuple[SidecarClient, Script]] = []

    def open_one(
        answer: Callable[[Message], list[Message]] = lambda message: [], **options: Callable[[], None]
    ) -> tuple[SidecarClient, Script]:
        path = str(tmp_path / f"{len(opened)}.sock")
        script = Script(path, HELLO, answer)
        client = SidecarClient.connect(path, **options)
        opened.append((client, script))
        return client, script

    yield open_one
    for client, script in opened:
        client.close()
        script.join()


def die(message: Message) -> list[Message]:
    return [Refused("", "")]


def wait_for_events(client: SidecarClient, count: int) -> list[object]:
    events: list[object] = []
    deadline = threading.Event()
    for _ in range(1000):
        events += client.poll()
        if len(events) >= count:
            return events
        deadline.wait(0.01)
    raise AssertionError(events)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(SidecarUnavailable, match="no sidecar at"):
        SidecarClient.connect(str(tmp_path / "nothing"))


def test_a_listener_that_says_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        with pytest.raises(SidecarUnavailable, match="no answer in time"):
            SidecarClient.connect(path, timeout_s=0.05)


@pytest.mark.parametrize("hello", [Refused("incompatible", "here 2, there 1"), HELLO_OF_ANOTHER])
def test_another_version(tmp_path: Path, hello: Message) -> None:
    script = Script(str(tmp_path / "s"), hello, lambda message: [])
    with pytest.raises(VersionMismatch):
        SidecarClient.connect(str(tmp_path / "s"))
    script.join()


def test_calls_and_their_failures(open_client: Open) -> None:
    def answer(message: Message) -> list[Message]:
        if isinstance(message, RegisterPool):
            return [PoolRegistered(message.call_id, "epoch-1")]
        if isinstance(message, OfferBlocks) and message.request_id == "good":
            return [Offer("t", "s", "epoch-1", 12.5, message.call_id)]
        assert isinstance(message, OfferBlocks)
        return [CallFailed(message.call_id, message.request_id, "no room")]

    client, script = open_client(answer)
    fd = os.memfd_create("pool")
    assert client.register_pool(fd, LAYOUT) == "epoch-1"
    assert os.fstat(script.fds[0]).st_ino == os.fstat(fd).st_ino
    os.close(fd)
    assert client.offer("good", [1], 16, 3.0).transfer_id == "t"
    for kind, error in (("OfferRefused", OfferRefused), ("LayoutRefused", LayoutRefused), ("Unheard", SidecarError)):
        with pytest.raises(error, match="no room"):
            client.offer(kind, [1], 16, 3.0)


def test_calls_from_many_threads_get_their_own_answers(open_client: Open) -> None:
    def answer(message: Message) -> list[Message]:
        assert isinstance(message, OfferBlocks)
        return [Offer(message.request_id, "s", "e", 0.0, message.call_id)]

    client, _ = open_client(answer)
    wrong: list[str] = []

    def work(name: str) -> None:
        names = [f"{name}-{number}" for number in range(100)]
        wrong.extend(name for name in names if client.offer(name, [], 0, 1.0).transfer_id != name)

    threads = [threading.Thread(target=work, args=(str(index),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_events_come_once_and_ring_the_bell(open_client: Open) -> None:
    rung = threading.Event()

    def answer(message: Message) -> list[Message]:
        assert isinstance(message, Pull)
        return [ended(message.pull_id), ended(message.pull_id), ended("never asked for"), OfferEnded("t", "consumed")]

    client, _ = open_client(answer, on_event=rung.set)
    client.pull("p", SOURCE, [3], first_block=1, deadline_s=2.0)
    assert wait_for_events(client, 2) == [ended("p"), OfferEnded("t", "consumed")]
    assert rung.is_set() and client.poll() == []
    client.pull("p", SOURCE, [3])  # the id is free again
    assert wait_for_events(client, 2)[0] == ended("p")


@pytest.mark.parametrize("wrong", [{"first_block": -1}, {"deadline_s": -1.0}, {"local_block_ids": [-1]}])
def test_a_pull_that_cannot_be_sent_raises_and_reports_nothing(open_client: Open, wrong: dict[str, object]) -> None:
    client, _ = open_client()
    with pytest.raises(ValueError):
        client.pull(**({"pull_id": "p", "source": SOURCE, "local_block_ids": [1]} | wrong))  # type: ignore[arg-type]
    client.pull("p", SOURCE, [1])
    with pytest.raises(ValueError, match="open already"):
        client.pull("p", SOURCE, [1])


def test_a_lost_sidecar_fails_each_open_pull_once_and_then_itself(open_client: Open) -> None:
    rung = threading.Event()

    def answer(message: Message) -> list[Message]:
        if isinstance(message, Pull) and message.pull_id == "done":
            return [ended("done")]
        return die(message) if isinstance(message, protocol.Abandon) else []

    client, _ = open_client(answer, on_event=rung.set)
    for name in ("a", "done", "b"):
        client.pull(name, SOURCE, [1])
    client.abandon("a")
    events = wait_for_events(client, 4)
    assert [(getattr(e, "pull_id", ""), getattr(e, "reason", "")) for e in events] == [
        ("done", ""), ("a", "sidecar_lost"), ("b", "sidecar_lost"), ("", "")
    ]  # fmt: skip
    assert isinstance(events[-1], SidecarLost) and client.poll() == [] and rung.is_set()
    with pytest.raises(SidecarUnavailable):
        client.pull("c", SOURCE, [1])
    with pytest.raises(SidecarUnavailable):
        client.offer("r", [], 0, 1.0)
    assert client.poll() == []


def test_a_call_that_the_sidecar_dies_of_raises(open_client: Open) -> None:
    client, _ = open_client(die)
    with pytest.raises(SidecarUnavailable):
        client.offer("r", [], 0, 1.0)


def test_a_hung_sidecar_is_given_up_but_open_pulls_are_not_reported_before_it_is_gone(
    open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_S", 0.05)
    gone = threading.Event()

    def answer(message: Message) -> list[Message]:
        if isinstance(message, OfferBlocks):
            gone.wait(10)  # hangs, and may still be writing
        return []

    client, _ = open_client(answer)
    client.pull("p", SOURCE, [1])
    with pytest.raises(SidecarUnavailable, match="did not answer within"):
        client._call(lambda call_id: OfferBlocks(call_id, "r", [], 0, 1.0), Offer, 0.05)
    assert client.poll() == []
    with pytest.raises(SidecarUnavailable):
        client.abandon("p")
    gone.set()  # it reads the end of our stream and closes
    events = wait_for_events(client, 2)
    assert isinstance(events[0], PullEnded) and events[0].reason == "sidecar_lost"


def test_closing_is_silent_and_idempotent(open_client: Open) -> None:
    client, _ = open_client()
    client.pull("p", SOURCE, [1])
    client.close()
    client.close()
    assert client.poll() == []
    with pytest.raises(SidecarUnavailable, match=r"closed|ended"):
        client.drop(SOURCE)


def test_a_landing_is_answered_and_ends_once(open_client: Open) -> None:
    def answer(message: Message) -> list[Message]:
        if isinstance(message, protocol.Land) and message.local_block_ids == [9]:
            return [CallFailed(message.call_id, "OfferRefused", "not in the pool")]
        if isinstance(message, protocol.Land):
            return [ended(message.pull_id), protocol.Landing(message.call_id, "l", "t", "e", 1.0)]
        return die(message)

    client, _ = open_client(answer)
    landing = client.land("p", [3], first_block=1, deadline_s=2.0)
    assert landing is not None and landing.landing_id == "l"
    assert wait_for_events(client, 1) == [ended("p")]
    with pytest.raises(OfferRefused, match="not in the pool"):
        client.land("q", [9])
    assert client.poll() == []
    client.land("q", [3])  # the id is free again
    assert wait_for_events(client, 1) == [ended("q")]


def test_landings_of_a_lost_sidecar_are_reported_once(open_client: Open) -> None:
    def answer(message: Message) -> list[Message]:
        if isinstance(message, protocol.Land) and message.pull_id == "a":
            return [protocol.Landing(message.call_id, "l", "t", "e", 1.0)]
        return die(message)

    client, _ = open_client(answer)
    client.land("a", [3])
    reported = {"a"}
    try:
        if client.land("b", [4]) is None:
            reported.add("b")
    except SidecarUnavailable:
        pass
    events = wait_for_events(client, len(reported) + 1)
    assert {event.pull_id for event in events if isinstance(event, PullEnded)} == reported
    assert [event.reason for event in events if isinstance(event, PullEnded)] == ["sidecar_lost"] * len(reported)


def test_a_pool_without_its_descriptors_is_nonsense(open_client: Open) -> None:
    opened = protocol.PoolOpened("h", 1, "p", "ep", LAYOUT)
    client, _ = open_client(lambda message: [opened])
    client.drop(SOURCE)
    (lost,) = wait_for_events(client, 1)
    assert isinstance(lost, SidecarLost) and "descriptors were expected" in lost.message

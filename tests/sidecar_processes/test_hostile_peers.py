"""Frames that no honest end sends: each closes its own connection and harms nobody else's."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from sidecar.framing import FrameDecoder, encode_frame
from sidecar.protocol import (
    PROTOCOL_VERSION,
    Claim,
    Deliver,
    EngineHello,
    Heartbeat,
    Message,
    OfferBlocks,
    OpenRegion,
    PeerHello,
    PullSource,
    RegisterPool,
    Release,
    encode,
)  # fmt: skip
from tests.sidecar_processes.harness import FakeEngine, Sidecar, a_layout, eventually, raw_connection


@dataclass
class Ends:
    producer_sidecar: Sidecar
    producer: FakeEngine
    consumer: FakeEngine


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    directory = tmp_path_factory.mktemp("hostile")
    with (
        Sidecar(directory, "p", "shm", "--connect-timeout-s", "1") as p,
        Sidecar(directory, "d", "shm") as d,
        FakeEngine(p) as producer,
        FakeEngine(d) as consumer,
    ):
        yield Ends(p, producer, consumer)


@pytest.fixture(autouse=True)
def unharmed(ends: Ends) -> Iterator[None]:
    """After each attack a pull still works and nothing is left open."""
    assert ends.consumer.pull(ends.producer.offer([1])[1], [1]).ok
    before = ends.producer_sidecar.usage()
    yield
    assert ends.consumer.pull(ends.producer.offer([1, 2])[1], [3, 4]).ok
    eventually(lambda: ends.producer_sidecar.usage() == before)
    log = ends.producer_sidecar.log_path.read_text()
    assert "Traceback" not in log, log


def peer_hello(ends: Ends, **changes: object) -> PeerHello:
    fields: dict[str, object] = {
        "version": PROTOCOL_VERSION, "engine_id": "mallory", "rank": 0, "sidecar_epoch": "e", "boot_id": "b",
        "transports": ("shm",), "wants_engine_id": "p", "wants_epoch": ends.producer.epoch, "layout": a_layout(),
    }  # fmt: skip
    return PeerHello(**(fields | changes))  # type: ignore[arg-type]


def answers(sock: socket.socket) -> list[dict[str, object]]:
    """Every message until the sidecar closes."""
    decoder = FrameDecoder(1 << 24)
    frames: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            frames += decoder.feed(chunk)
    return [msgspec.msgpack.decode(frame) for frame in frames]


def say(target: str, *payloads: bytes | Message, raw: bytes = b"") -> list[dict[str, object]]:
    with raw_connection(target) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for payload in payloads:
                sock.sendall(encode_frame(encode(payload) if isinstance(payload, Message) else payload))
            sock.sendall(raw)
        return answers(sock)


def targets(ends: Ends) -> tuple[str, str]:
    return ends.producer_sidecar.listen, ends.producer_sidecar.socket_path


@pytest.mark.parametrize("which", [0, 1], ids=["peer", "engine"])
@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff",  # four gigabytes announced
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        encode_frame(b""),
        encode_frame(b"\xc1"),
        encode_frame(b"\x91" * 100_000),  # nested deeper than any stack
        encode_frame(msgspec.msgpack.encode({"type": "claim", "version": 1})),
        encode_frame(msgspec.msgpack.encode({"type": "peer_hello", "version": "one"})),
        encode_frame(msgspec.msgpack.encode({"type": "peer_hello", "version": 1})),
        encode_frame(msgspec.msgpack.encode([1, 2, 3])),
        b"\x00\x00\x00\x10abc",
    ],
    ids=["bomb", "http", "empty", "unused", "nested", "no_hello", "typed", "fields", "list", "cut"],
)
def test_garbage_before_the_hello(ends: Ends, which: int, raw: bytes) -> None:
    with raw_connection(targets(ends)[which]) as sock:
        sock.sendall(raw)
        if raw.endswith(b"abc"):
            sock.shutdown(socket.SHUT_WR)
        assert [answer for answer in answers(sock) if answer["type"] != "refused"] == []


def test_another_version_is_told_both_versions(ends: Ends) -> None:
    [refused] = say(targets(ends)[0], peer_hello(ends, version=999))
    assert refused["reason"] == "incompatible" and f"here {PROTOCOL_VERSION}, there 999" in str(refused["message"])
    [refused] = say(targets(ends)[1], EngineHello(999, "test"))
    assert refused["reason"] == "incompatible" and f"here {PROTOCOL_VERSION}, there 999" in str(refused["message"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"wants_engine_id": "q"}, "wrong_engine"), ({"wants_epoch": "old"}, "stale_epoch")],
    ids=["engine", "epoch"],
)
def test_a_hello_for_somebody_else_is_refused(ends: Ends, changes: dict[str, object], reason: str) -> None:
    [refused] = say(targets(ends)[0], peer_hello(ends, **changes))
    assert refused["reason"] == reason


def test_a_peer_that_says_nothing_is_let_go(ends: Ends) -> None:
    with raw_connection(targets(ends)[0]) as sock:
        assert answers(sock) == []


def talk(ends: Ends, *messages: Message) -> list[dict[str, object]]:
    """One answer to each message after a proper hello."""
    decoder, frames = FrameDecoder(1 << 24), list[bytes]()
    with raw_connection(targets(ends)[0]) as sock:
        for message in (peer_hello(ends), *messages):
            sock.sendall(encode_frame(encode(message)))
        while len(frames) < 1 + len(messages):
            frames += decoder.feed(sock.recv(65536))
    welcome, *rest = (msgspec.msgpack.decode(frame) for frame in frames)
    assert welcome["type"] == "peer_welcome"
    return rest


def test_unknown_ids_and_tokens_are_refused_one_by_one(ends: Ends) -> None:
    offer, _ = ends.producer.offer([1])
    told = talk(
        ends,
        Claim(1, "nobody", "token"),
        Claim(2, offer.transfer_id, ""),
        Heartbeat(3, offer.transfer_id, offer.token),
        Release(4, offer.transfer_id, offer.token, "consumed"),
        Release(5, offer.transfer_id, offer.token, "eaten"),
        OpenRegion(6, "shm"),
        OpenRegion(7, "carrier pigeon"),
    )
    reasons = {answer["call_id"]: answer["reason"] for answer in told}
    assert reasons == {
        1: "unknown", 2: "wrong_token", 3: "unknown", 4: "unknown", 5: "invalid", 6: "incompatible", 7: "incompatible"
    }  # fmt: skip
    ends.producer.client.revoke(offer.transfer_id)


def test_a_replayed_token_works_once(ends: Ends) -> None:
    offer, _ = ends.producer.offer([1])
    told = talk(
        ends,
        Claim(1, offer.transfer_id, offer.token),
        Release(2, offer.transfer_id, offer.token, "consumed"),
        Release(3, offer.transfer_id, offer.token, "consumed"),
        Claim(4, offer.transfer_id, offer.token),
    )
    assert [(answer["type"], answer.get("reason")) for answer in told] == [
        ("claimed", None), ("done", None), ("call_refused", "released"), ("call_refused", "released")
    ]  # fmt: skip


def test_a_layout_of_nonsense_makes_its_peer_incompatible(ends: Ends) -> None:
    offer, _ = ends.producer.offer([1])
    hello = peer_hello(ends, layout=msgspec.structs.replace(a_layout(), planes=()))
    welcome, refused = say(targets(ends)[0], hello, Claim(1, offer.transfer_id, offer.token), b"\xc1")
    assert "planes" in str(welcome["mismatch"]) and refused["reason"] == "incompatible"
    ends.producer.client.revoke(offer.transfer_id)


def test_an_engine_that_breaks_the_protocol_is_cut_off(ends: Ends) -> None:
    hello = EngineHello(PROTOCOL_VERSION, "test")
    path = targets(ends)[1]
    assert [a["type"] for a in say(path, hello, hello)] == ["sidecar_hello"]
    assert [a["type"] for a in say(path, hello, RegisterPool(1, a_layout()))] == ["sidecar_hello"]  # no descriptor
    told = say(path, hello, OfferBlocks(7, "r", [1], 16, 1.0), b"\xc1")
    assert [(a["type"], a.get("kind")) for a in told[1:]] == [("call_failed", "OfferRefused")]


def test_a_second_engine_is_refused_while_the_first_lives(ends: Ends) -> None:
    fd = os.memfd_create("second")
    try:
        os.ftruncate(fd, a_layout().pool_bytes)
        with raw_connection(targets(ends)[1]) as sock:
            sock.sendall(encode_frame(encode(EngineHello(PROTOCOL_VERSION, "second"))))
            socket.send_fds(sock, [encode_frame(encode(RegisterPool(1, a_layout())))], [fd])
            decoder, frames = FrameDecoder(1 << 24), list[bytes]()
            while len(frames) < 2:
                frames += decoder.feed(sock.recv(65536))
        failed = msgspec.msgpack.decode(frames[1])
        assert failed["kind"] == "LayoutRefused" and "another engine" in failed["message"]
    finally:
        os.close(fd)


def test_descriptors_nobody_asked_for_are_closed(ends: Ends) -> None:
    fd = os.memfd_create("stray")
    try:
        # a second hello ends the connection, perhaps before the third is sent
        with raw_connection(targets(ends)[1]) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(3):
                socket.send_fds(sock, [encode_frame(encode(EngineHello(PROTOCOL_VERSION, "x")))], [fd] * 3)
            answers(sock)
    finally:
        os.close(fd)


def test_deliveries_of_nobody_fill_no_landing(ends: Ends) -> None:
    """A guessed token, a landing that is none, too many blocks, another model: refused, and the landing stands."""
    landing = ends.producer.client.land("landing", [7, 8])
    assert landing is not None
    before = ends.producer.pool[:]
    source = PullSource("127.0.0.1", 1, "mallory", "t", "s", "e", 2)
    more = PullSource("127.0.0.1", 1, "mallory", "t", "s", "e", 3)
    attempts = [
        (Deliver(1, landing.landing_id, "0" * 32, source), {}, "wrong_token"),
        (Deliver(1, "0" * 16, landing.token, source), {}, "unknown"),
        (Deliver(1, landing.landing_id, landing.token, more), {}, "invalid"),
        (Deliver(1, landing.landing_id, landing.token, source), {"layout": a_layout(model="other")}, "incompatible"),
        (Deliver(1, landing.landing_id, landing.token, source), {"layout": None}, "incompatible"),
    ]
    for deliver, changes, reason in attempts:
        with raw_connection(targets(ends)[0]) as sock:
            sock.sendall(encode_frame(encode(peer_hello(ends, **changes))) + encode_frame(encode(deliver)))
            sock.shutdown(socket.SHUT_WR)
            _, refused = answers(sock)
        assert (refused["type"], refused["reason"]) == ("call_refused", reason)
    assert ends.producer.pool[:] == before and ends.producer.count("landing") == 0
    ends.producer.client.abandon("landing")
    assert ends.producer.pull_ended("landing").reason == "abandoned"

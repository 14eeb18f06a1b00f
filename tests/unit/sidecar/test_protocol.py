from __future__ import annotations

import msgspec
import pytest

from sidecar import protocol
from sidecar.errors import FrameError
from sidecar.protocol import (
    CHANGES,
    PROTOCOL_VERSION,
    Claim,
    EngineHello,
    KvLayout,
    OfferBlocks,
    PeerHello,
    Plane,
    Pull,
    PullSource,
    RegisterPool,
    decode,
    encode,
    version_fault,
)  # fmt: skip

LAYOUT = KvLayout(4, 16, (Plane(0, 8, 8),), 1, 1, 1, "float32", "m", "o")
SOURCE = PullSource("h", 1, "e", "t", "s", "p", 2)


@pytest.mark.parametrize(
    "message",
    [
        EngineHello(1, "x"), RegisterPool(1, LAYOUT), OfferBlocks(2, "r", [1, 2], 32, 1.5),
        Pull("p", (SOURCE,), [1], 0, 2.0), protocol.Revoke("t"), protocol.Abandon("p"), protocol.Drop(SOURCE),
    ],
    ids=lambda message: type(message).__name__,
)  # fmt: skip
def test_what_an_engine_says_is_read_back(message: protocol.Message) -> None:
    assert decode(protocol.from_engine, encode(message)) == message


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", msgspec.msgpack.encode(7), msgspec.msgpack.encode({"type": "nonsense"}),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode({"type": "offer_blocks", "call_id": 1}),
        encode(OfferBlocks(1, "r", [-1], 1, 1.0)), encode(OfferBlocks(-1, "r", [], 1, 1.0)),
        encode(OfferBlocks(1, "r", [], 1, float("nan"))), encode(OfferBlocks(1, "r", [], 1, 1e30)),
        encode(OfferBlocks(1, "r" * 20_000, [], 1, 1.0)), encode(Claim(1, "t", "s")),
        encode(OfferBlocks(1, "r", ["1"], 1, 1.0)),  # type: ignore[list-item]
        b"\x91" * 100_000,
    ],
)  # fmt: skip
def test_what_an_engine_cannot_say_is_a_frame_error(payload: bytes) -> None:
    with pytest.raises(FrameError):
        decode(protocol.from_engine, payload)


def test_fields_of_a_later_version_are_passed_over() -> None:
    later = msgspec.msgpack.encode({"type": "claim", "call_id": 1, "transfer_id": "t", "token": "s", "added": [1]})
    assert decode(protocol.from_consumer, later) == Claim(1, "t", "s")


def test_versions() -> None:
    assert max(CHANGES) == PROTOCOL_VERSION
    assert version_fault(encode(EngineHello(PROTOCOL_VERSION, "x")), "engine_hello") == ""
    assert version_fault(encode(EngineHello(77, "x")), "engine_hello").endswith(f"here {PROTOCOL_VERSION}, there 77")
    unreadable_otherwise = msgspec.msgpack.encode({"type": "peer_hello", "version": 78, "all": "changed"})
    assert version_fault(unreadable_otherwise, "peer_hello").endswith("there 78")
    with pytest.raises(FrameError, match="began with 'engine_hello'"):
        version_fault(encode(EngineHello(1, "x")), "peer_hello")


def test_a_layout_may_be_missing_from_a_hello() -> None:
    hello = PeerHello(1, "e", 0, "s", "b", ("shm",), "w", "p", None)
    assert decode(protocol.from_consumer, encode(hello)) == hello

from __future__ import annotations

import pytest

from sidecar.errors import FrameError
from sidecar.framing import FrameDecoder, encode_frame

PAYLOADS = [b"", b"a", b"hello", bytes(300)]
STREAM = b"".join(encode_frame(payload) for payload in PAYLOADS)


@pytest.mark.parametrize("at", range(len(STREAM) + 1))
def test_a_stream_split_anywhere_gives_the_same_frames(at: int) -> None:
    decoder = FrameDecoder(300)
    assert decoder.feed(STREAM[:at]) + decoder.feed(STREAM[at:]) == PAYLOADS
    assert not decoder.mid_frame


def test_byte_by_byte() -> None:
    decoder = FrameDecoder(300)
    assert [frame for byte in STREAM for frame in decoder.feed(bytes([byte]))] == PAYLOADS


def test_a_cut_frame_is_unfinished() -> None:
    decoder = FrameDecoder(300)
    assert decoder.feed(STREAM[:-1]) == PAYLOADS[:-1]
    assert decoder.mid_frame


def test_the_limit_holds_at_the_header_already() -> None:
    assert FrameDecoder(5).feed(encode_frame(b"12345")) == [b"12345"]
    with pytest.raises(FrameError, match="6 bytes is over the limit of 5"):
        FrameDecoder(5).feed((6).to_bytes(4, "big"))

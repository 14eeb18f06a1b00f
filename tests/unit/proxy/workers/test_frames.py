from __future__ import annotations

import pytest

from proxy.workers.frames import MAX_FRAME_BYTES, Decoder, Message, encode

MESSAGES = [
    Message("ask", "instances/add", 7, 1, None, "", {"type": "decode", "instances": ["h:1", "☃"]}, b""),
    Message("answer", "metrics", 1 << 40, 0, [1], "", None, b"\x00\xff" * 300),
    Message("tell", "ready"),
    Message("answer", "x", 3, 2, [0], "worker 2 has ended", 404),
]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100, 10_000])
def test_messages_come_out_as_they_went_in_however_they_are_cut(step: int) -> None:
    sent = b"".join(map(encode, MESSAGES))
    decoder = Decoder()
    found = [one for at in range(0, len(sent), step) for one in decoder.feed(sent[at : at + step])]
    assert found == MESSAGES


@pytest.mark.parametrize(
    "head", [(MAX_FRAME_BYTES + 1).to_bytes(4) + (2).to_bytes(4), (8).to_bytes(4) + (5).to_bytes(4)]
)
def test_what_no_process_of_ours_sends_is_refused(head: bytes) -> None:
    with pytest.raises(ValueError, match="frame"):
        list(Decoder().feed(head))

"""Messages between the worker processes and their parent: fields as JSON, and bytes that are not looked into. Pure.

A frame is two sizes of four bytes (all that follows, the fields), the fields, the body. Kinds of `Message`:

| kind | from, to | meaning |
|---|---|---|
| ask | worker to parent to the other workers | do `call`, answer under `id` |
| asked | parent to the asker | who was asked; the body is what the parent has itself |
| answer | worker to parent to the asker | of `call`; `error` says why it was not done |
| tell | worker to parent, parent to worker | nobody waits for an answer |
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

PARENT = -1
MAX_FRAME_BYTES = 64 << 20

_SIZES = struct.Struct("!II")


@dataclass(slots=True)
class Message:
    kind: str
    call: str = ""
    id: int = 0
    sender: int = PARENT
    to: list[int] | None = None
    """Worker numbers; None is all others."""
    error: str = ""
    fields: Any = None
    body: bytes = field(default=b"", repr=False)


def encode(message: Message) -> bytes:
    head = orjson.dumps(
        [message.kind, message.call, message.id, message.sender, message.to, message.error, message.fields]
    )
    return _SIZES.pack(4 + len(head) + len(message.body), len(head)) + head + message.body


class Decoder:
    """Bytes in, messages out. Raises ValueError for what no process of ours has sent."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        held = self._held
        held += data
        while len(held) >= _SIZES.size:
            size, head_size = _SIZES.unpack_from(held)
            if size > MAX_FRAME_BYTES or head_size + 4 > size:
                raise ValueError(f"a frame of {size} bytes with a head of {head_size}")
            if len(held) < size + 4:
                return
            head = bytes(held[8 : 8 + head_size])
            body = bytes(held[8 + head_size : 4 + size])
            del held[: size + 4]
            kind, call, number, sender, to, error, fields = orjson.loads(head)
            yield Message(kind, call, number, sender, to, error, fields, body)

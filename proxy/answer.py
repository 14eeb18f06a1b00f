"""What an instance answered, as far as it was waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy import http1
from proxy.http1 import ResponseHead

if TYPE_CHECKING:
    from proxy.upstream import UpstreamConnection


class Answer:
    """What an instance answered: all of it (`complete`), or a stream up to its first telling event."""

    __slots__ = ("complete", "connection", "first_event", "head", "raw")

    def __init__(
        self, connection: UpstreamConnection, head: ResponseHead, raw: bytes, complete: bool, first_event: bytes | None
    ) -> None:
        self.connection = connection
        self.head = head
        self.raw = raw  # of the body, with its framing
        self.complete = complete
        self.first_event = first_event

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def body(self) -> bytes:
        return http1.dechunk(self.raw) if self.head.chunked else self.raw

    def with_body(self, body: bytes) -> Answer:
        """The same answer, whole, with another body."""
        head = ResponseHead()
        head.status, head.fields, head.event_stream = self.head.status, self.head.fields, self.head.event_stream
        head.named_by_connection = self.head.named_by_connection
        return Answer(self.connection, head, body, True, None)

    def as_error(self, status: int, body: bytes) -> Answer:
        """The answer an engine would have given, had it known of the error before it sent its 200."""
        head = ResponseHead()
        head.status = status
        head.add(b"Content-Type", b"application/json")
        return Answer(self.connection, head, body, True, None)

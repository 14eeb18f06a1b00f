"""The id of an answer. Engines make it of a prefix and of X-Request-Id (`cmpl-ID`); the client is to see its own
request's, also where the leg that was answered had an id of its own (a retry, a contract that mints one)."""

from __future__ import annotations

import re

import orjson

_BEFORE = re.compile(rb'"id": ?"[A-Za-z_-]{0,32}')


def renaming(answer: bytes, leg_id: str, request_id: str) -> tuple[bytes, bytes] | None:
    """What is to be replaced by what, of an answer that begins so; None where its id is not made of `leg_id`.

    A name in quotes and a colon cannot stand inside a JSON string: what is replaced is the member, never text."""
    end = orjson.dumps(leg_id)[1:]
    at = answer.find(end)
    start = answer.rfind(b'"id"', 0, at) if at >= 0 else -1
    if start < 0 or _BEFORE.fullmatch(answer, start, at) is None:
        return None
    return answer[start : at + len(end)], answer[start:at] + orjson.dumps(request_id)[1:]


def renamed(answer: bytes, leg_id: str, request_id: str) -> bytes:
    """A whole answer, or all events of one, without framing, under the client's id."""
    found = renaming(answer, leg_id, request_id)
    return answer.replace(*found) if found is not None else answer

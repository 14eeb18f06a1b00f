"""Server-sent events, as far as a relay has to know them: where the first event that says something ends."""

from __future__ import annotations

import re

import orjson

from proxy.errors import error_body

# An event ends at an empty line; a line ends with LF, CRLF or CR (WHATWG HTML, section 9.2.6).
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
DONE = b"data: [DONE]\n\n"


def first_telling_event(body: bytes) -> bytes | None:
    """The first complete event in `body` that commits the engine to an answer, or None if it has not come yet.

    Comments and chat's opening chunk (a role and no text) do not count: vLLM sends that chunk before an error too
    (kv-contracts section 1.5), so it says nothing about whether the KV was loaded.
    """
    start = 0
    for end in EVENT_END.finditer(body):
        event = body[start : end.start()]
        start = end.end()
        if event.startswith(b"data:") and not _is_opening_chunk(event):
            return event
    return None


def _is_opening_chunk(event: bytes) -> bool:
    if b'"role"' not in event or b'"content":""' not in event.replace(b'": "', b'":"'):
        return False
    choices = _json_of(event).get("choices")
    return isinstance(choices, list) and all(
        isinstance(choice, dict)
        and choice.get("finish_reason") is None
        and isinstance(delta := choice.get("delta"), dict)
        and not any(value for key, value in delta.items() if key != "role")
        for choice in choices
    )


def _json_of(event: bytes) -> dict[str, object]:
    try:
        parsed = orjson.loads(event[5:])
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def error_of(event: bytes) -> tuple[int, bytes] | None:
    """Status and body of an error event (`data: {"error": ...}`), or None if the event is not one."""
    if not event[5:].lstrip().startswith((b'{"error"', b'{"object":"error"', b'{"object": "error"')):
        return None
    parsed = _json_of(event)
    error = parsed.get("error") if isinstance(parsed.get("error"), dict) else parsed
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    if not parsed:
        return status, error_body(status, "The decode instance sent an error that is not JSON.", "upstream_error")
    return status, orjson.dumps(parsed)


def error_event(status: int, message: str, error_type: str) -> bytes:
    return b"data: " + error_body(status, message, error_type) + b"\n\n"

"""Server-sent events, as far as a relay has to know them: where the first event that says something ends."""

from __future__ import annotations

import re

import orjson

from proxy.errors import anthropic_status, error_body

# An event ends at an empty line; a line ends with LF, CRLF or CR (WHATWG HTML, section 9.2.6).
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
DONE = b"data: [DONE]\n\n"


# What opens a stream of /v1/messages or /v1/responses before the engine has computed anything, and pings.
_OPENING_NAMES = frozenset(
    (
        b"message_start", b"content_block_start", b"ping", b"response.created", b"response.queued",
        b"response.in_progress", b"response.output_item.added", b"response.content_part.added",
    )
)  # fmt: skip


def first_telling_event(body: bytes) -> bytes | None:
    """The first complete event in `body` that commits the engine to an answer, or None if it has not come yet.

    Comments and what only opens an answer (chat's chunk with a role and no text, Anthropic's `message_start` and the
    like) do not count: vLLM sends them before an error too (kv-contracts section 1.5), so they say nothing about
    whether the KV was loaded.
    """
    start = 0
    for end in EVENT_END.finditer(body):
        event = body[start : end.start()]
        start = end.end()
        if event.startswith(b"data:"):
            if not _is_opening_chunk(event):
                return event
        elif event.startswith(b"event:") and name_of(event) not in _OPENING_NAMES:
            return event
    return None


def name_of(event: bytes) -> bytes:
    """What stands in the event's `event:` line, its first."""
    return event[6:].split(b"\n", 1)[0].strip()


def data_of(event: bytes) -> bytes:
    """What stands in the event's `data:` lines."""
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


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


def error_of(event: bytes, route: str = "") -> tuple[int, bytes] | None:
    """Status and body of an error event (`data: {"error": ...}`), or None if the event is not one. Where it says
    nothing that can be read, the body is ours, as the API of `route` has it."""
    if event.startswith(b"event:"):
        return _named_error(event, route)
    if not event[5:].lstrip().startswith((b'{"error"', b'{"object":"error"', b'{"object": "error"')):
        return None
    parsed = _json_of(event)
    error = parsed.get("error") if isinstance(parsed.get("error"), dict) else parsed
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    if not parsed:
        return status, error_body(status, _WORDLESS, "upstream_error", None, route)
    return status, orjson.dumps(parsed)


_WORDLESS = "The decode instance sent an error that is not JSON."


def _named_error(event: bytes, route: str) -> tuple[int, bytes] | None:
    """Anthropic's `event: error`, and the `error` and `response.failed` of /v1/responses."""
    name = name_of(event)
    if name not in (b"error", b"response.failed"):
        return None
    data = data_of(event)
    parsed = _json_of(b"data:" + data)
    if not parsed:
        return 502, error_body(502, _WORDLESS, "upstream_error", None, route)
    response = parsed.get("response")
    error = (response if isinstance(response, dict) else parsed).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code <= 599:
        status = code
    else:
        status = anthropic_status(error.get("type")) if isinstance(error, dict) else 502
    return status, orjson.dumps({"error": error}) if name == b"response.failed" else data


def as_event(status: int, body: bytes, route: str) -> bytes:
    """The body of an error answer as an event, for a client that has its 200 already."""
    parsed = _json_of(b"data:" + body)
    error = parsed.get("error")
    fields = error if isinstance(error, dict) else parsed
    message = fields.get("message") or f"An instance answered {status}."
    if not isinstance(error, dict) or route == "responses" or (route == "messages" and "type" not in parsed):
        return error_event(status, str(message), str(fields.get("type") or "upstream_error"), route)
    name = b"event: error\n" if route == "messages" else b""
    return name + b"data: " + orjson.dumps(parsed) + b"\n\n"


def error_event(status: int, message: str, error_type: str, route: str = "") -> bytes:
    """An error in the middle of an answer, as the API of `route` has it."""
    body = error_body(status, message, error_type, None, route)
    if route == "responses":
        body = orjson.dumps({"type": "error", "code": str(status), "message": message, "param": None})
    return (b"event: error\ndata: " if route in ("responses", "messages") else b"data: ") + body + b"\n\n"

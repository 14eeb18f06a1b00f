"""What can go wrong in the proxy, whose fault it is, and what the client is told.

Every error that reaches a client has the OpenAI shape `{"error": {"message", "type", "param", "code"}}`. `ProxyError`
is what the proxy itself answers; `UpstreamFailure` is what an instance did to us, and `retry.py` says what follows
from it.
"""

from __future__ import annotations

import enum

import orjson


class ConfigError(Exception):
    """The configuration cannot be used. The message is one line: what is wrong and what to write instead."""


class StartError(Exception):
    """The proxy cannot start (an occupied port, say). The message is one line: what is wrong and what to do."""


class ProxyError(Exception):
    """An answer of the proxy's own: `status`, an OpenAI error type, the field at fault, seconds for Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        error_type: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.error_type = error_type
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        return error_body(self.status, self.message, self.error_type, self.param)


def error_body(status: int, message: str, error_type: str, param: str | None = None) -> bytes:
    """The OpenAI error object as JSON; `code` is the HTTP status, as vLLM has it."""
    return orjson.dumps({"error": {"message": message, "type": error_type, "param": param, "code": status}})


class BadRequest(ProxyError):
    """The client's request cannot be served as it is; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(400, message, param=param)


class BadHead(ProxyError):
    """The bytes are not an HTTP/1 request we accept: answered, then the connection is closed."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(status, message)


class TooLarge(ProxyError):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(413, f"The request body is larger than the limit of {limit_bytes} bytes (--max-body-bytes).")


class NoInstance(ProxyError):
    """No instance of a role can be asked: none is configured, or all are out."""

    def __init__(self, role: str, reason: str) -> None:
        super().__init__(
            503, f"No {role} instance is available: {reason}.", error_type="service_unavailable", retry_after_s=1
        )


class Failure(enum.StrEnum):
    """What an instance did instead of answering 2xx; the columns of the retry table."""

    REFUSED = "refused"  # no connection could be made: the request was not read
    CONNECT_TIMEOUT = "connect_timeout"
    STALE = "stale"  # a reused connection died before a byte of the answer: a restarted engine, mostly
    RESET = "reset"  # a fresh connection died before the answer was whole (or before the first event)
    TIMEOUT = "timeout"  # no answer, or no first event, in time
    INSTANCE_OUT = "instance_out"  # not a byte, and meanwhile the probes have taken the instance out
    GARBAGE = "garbage"  # not HTTP, or not what the contract promises
    CLIENT_ERROR = "client_error"  # 4xx
    SERVER_ERROR = "server_error"  # 5xx
    ERROR_EVENT = "error_event"  # 200, and the first event of the stream is an error
    # The client has bytes of the answer already:
    LOST_MID_ANSWER = "lost_mid_answer"  # the connection ended
    SILENT_MID_ANSWER = "silent_mid_answer"  # nothing came for too long, or since the probes took the instance out
    GARBAGE_MID_ANSWER = "garbage_mid_answer"  # what came is not HTTP
    OUT_OF_TIME = "out_of_time"  # the request's own limit (--total-timeout-s), whatever the instance does


class UpstreamFailure(Exception):
    """An instance failed at a request of ours. `answer` is its response where it gave one."""

    def __init__(self, failure: Failure, message: str, answer: object | None = None) -> None:
        super().__init__(message)
        self.failure = failure
        self.message = message
        self.answer = answer

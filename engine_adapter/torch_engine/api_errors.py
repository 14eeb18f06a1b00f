"""Errors as an OpenAI client reads them: `{"error": {"message", "type", "param", "code"}}`, in vLLM's words. Pure."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

MAX_SHOWN_INPUT_CHARS = 80
MAX_SHOWN_ERRORS = 4
UNION_MEMBERS = ("str", "int", "float", "bool")


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field at fault, where there is one."""

    def __init__(
        self, message: str, *, status: int = 400, error_type: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.error_type = error_type
        self.param = param

    def body(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": self.error_type, "param": self.param, "code": self.status},
        }


def model_not_found(name: str) -> ApiError:
    return ApiError(f"The model `{name}` does not exist.", status=404, error_type="NotFoundError", param="model")


def context_too_long(max_model_len: int, num_prompt_tokens: int, max_tokens: int) -> ApiError:
    """vLLM's sentence; at least one token has to be generated."""
    total = num_prompt_tokens + max_tokens
    return ApiError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {max_tokens} output "
        f"tokens and your prompt contains {num_prompt_tokens} input tokens, for a total of {total} tokens. Please "
        "reduce the length of the input prompt or the number of requested output tokens. "
        f"(parameter=input_tokens, value={num_prompt_tokens})",
        param="input_tokens",
    )


def status_error(status: int, message: str | None = None) -> ApiError:
    """For what HTTP itself refuses: unknown path, wrong method, body over the limit."""
    phrase = HTTPStatus(status).phrase
    return ApiError(message or phrase, status=status, error_type=phrase)


def service_unavailable(message: str) -> ApiError:
    return ApiError(message, status=503, error_type="ServiceUnavailableError")


def from_validation_error(error: ValidationError) -> ApiError:
    """One sentence a wrong field, each naming the field; 400 as in vLLM, never 422. Long inputs aren't repeated."""
    problems = error.errors(include_url=False)
    sentences = [_sentence(dict(problem)) for problem in problems[:MAX_SHOWN_ERRORS]]
    plural = "s" if len(problems) > 1 else ""
    return ApiError(
        f"{len(problems)} validation error{plural}: " + "; ".join(sentences),
        error_type="Bad Request",
        param=_field(problems[0]["loc"]) or None,
    )


def _sentence(problem: dict[str, Any]) -> str:
    field = _field(problem["loc"])
    message = str(problem["msg"])
    if problem["type"] == "missing":
        return f"{field}: {message}"
    shown = repr(problem["input"])
    if len(shown) > MAX_SHOWN_INPUT_CHARS:
        shown = shown[:MAX_SHOWN_INPUT_CHARS] + "..."
    return f"{field}: {message}, got {shown}" if field else f"{message}, got {shown}"


def _field(loc: tuple[int | str, ...]) -> str:
    """The path as a client wrote it: pydantic adds the tried member of a union, such as `str` or `list[any]`."""
    return ".".join(str(part) for part in loc if part not in UNION_MEMBERS and "[" not in str(part))

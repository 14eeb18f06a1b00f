"""A chat message's content: text, and images by URL, in the forms that OpenAI clients send. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine_adapter.torch_engine.api_errors import ApiError

TEXT_TYPES = ("text", "input_text")
IMAGE_TYPES = ("image_url", "input_image")


@dataclass(frozen=True, slots=True)
class ImageSource:
    """`field` is its place in the request, for errors."""

    field: str
    url: str


Part = str | ImageSource


def read_parts(content: str | list[Any] | None, position: int, model_name: str, *, sees: bool) -> list[Part]:
    """The parts of message number `position`. Raises ApiError, for an image also where the model does not see."""
    if content is None or isinstance(content, str):
        return [content or ""]
    fields = (f"messages.{position}.content.{number}" for number in range(len(content)))
    return [_part(part, field, model_name, sees) for part, field in zip(content, fields, strict=True)]


def _part(part: Any, field: str, model_name: str, sees: bool) -> Part:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ApiError(f"{field} must be an object with a type", error_type="Bad Request", param=field)
    kind = part["type"]
    if kind in TEXT_TYPES:
        if not isinstance(part.get("text"), str):
            raise ApiError(f"{field}.text must be a string", error_type="Bad Request", param=f"{field}.text")
        return str(part["text"])
    if not sees:
        raise ApiError(f"{field}: the model `{model_name}` takes text only, not {kind[:40]!r}", param=field)
    if kind not in IMAGE_TYPES:
        known = ", ".join((*TEXT_TYPES, *IMAGE_TYPES))
        raise ApiError(f"{field}: the model `{model_name}` takes {known}, not {kind[:40]!r}", param=field)
    return ImageSource(field, _url(part, field))


def _url(part: dict[str, Any], field: str) -> str:
    """`{"image_url": {"url": ...}}`, or the URL alone as vLLM takes it too."""
    url = part.get("image_url")
    if isinstance(url, dict):
        url = url.get("url")
    if not isinstance(url, str) or not url:
        raise ApiError(f"{field}.image_url.url must be a string", error_type="Bad Request", param=f"{field}.image_url")
    return url

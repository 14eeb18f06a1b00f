"""Images in a chat's messages: how much they make a prompt, and whether there are any. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

IMAGE_TOKENS = 1024
"""What an image is guessed to cost: Qwen2.5-VL takes a token for 28 x 28 pixels, so that is 1024 x 784 of them."""
MARK = b'image_url"'
"""In every body with an image, as OpenAI's clients write it; what has none is not looked through."""


def image_urls(messages: list[Any]) -> Iterator[str]:
    """URLs of the images; a data URL is the image. Whatever is not as it should be is the engine's to refuse."""
    for message in messages:
        content = message.get("content") if type(message) is dict else None
        for part in content if type(content) is list else ():
            url = part.get("image_url") if type(part) is dict else None
            if type(url) is dict:
                url = url.get("url")
            if type(url) is str:
                yield url


def has_images(messages: Any) -> bool:
    return type(messages) is list and next(image_urls(messages), None) is not None


def bytes_and_tokens(num_body_bytes: int, messages: list[Any]) -> tuple[int, int]:
    """The body's bytes without its images, and the tokens that these are guessed to be.

    Four bytes of a data URL are no token: a photograph would count as hundreds of thousands, and nothing else would be
    let onto its decoder."""
    num_tokens = 0
    for url in image_urls(messages):
        num_body_bytes -= len(url)
        num_tokens += IMAGE_TOKENS
    return max(0, num_body_bytes), num_tokens

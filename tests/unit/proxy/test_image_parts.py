from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.image_parts import IMAGE_TOKENS, has_images
from proxy.openai_api import parse_call


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def num_tokens(given: Any) -> int:
    return parse_call("chat", orjson.dumps({"messages": given})).num_prompt_tokens


def test_an_image_costs_by_itself_and_not_by_its_bytes() -> None:
    text = num_tokens(messages("x" * 400))
    one = num_tokens(
        messages([{"type": "text", "text": "x" * 400}, image({"url": "data:image/png;base64," + "A" * 10**6})])
    )
    assert text + IMAGE_TOKENS < one < text + IMAGE_TOKENS + 50
    two = num_tokens(messages([image("https://x/1.png")], [image({"url": "https://x/2.png"})]))
    assert 2 * IMAGE_TOKENS < two < 2 * IMAGE_TOKENS + 100


def test_words_about_images_are_text() -> None:
    assert num_tokens(messages('what is an "image_url" in "image_url" parts?')) < 50
    assert num_tokens(messages("image_url" * 400)) > 800


@pytest.mark.parametrize(
    "given",
    [None, "x", [], [None], ["x"], messages(None), messages("x"), messages([None, 3, "x"]),
     messages([{"type": "text"}]),
     messages([image(None)]), messages([image({})]), messages([image({"url": 5})]), messages([image([])])],
)  # fmt: skip
def test_whatever_holds_no_image(given: Any) -> None:
    assert not has_images(given)
    if type(given) is list:
        assert num_tokens(given) < 100


def test_what_holds_one() -> None:
    assert has_images(messages("x", [image({"url": "https://x/y.png"})]))
    assert has_images(messages([{"type": "input_image", "image_url": "https://x/y.png"}]))

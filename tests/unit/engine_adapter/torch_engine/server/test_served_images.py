"""A real `pd-engine serve` of a model that sees: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image as Pillow

from engine_adapter.torch_engine.make_model import make_model
from tests.unit.engine_adapter.torch_engine.server.conftest import Served, start_engine

Json = dict[str, Any]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("seeing")
    make_model(directory / "model", "qwen2_5_vl", "tiny")
    flags = ("--limit-mm-per-prompt", '{"image": 2}', "--max-media-bytes", "20000", "--max-image-pixels", "90000")
    served = start_engine(directory / "model", directory / "log", *flags)
    yield served
    served.process.terminate()
    assert served.process.wait(30) == 0
    assert served.process.stdout is not None
    served.process.stdout.close()


def url_of(width: int = 60, height: int = 60, colour: str = "red", *, noise: bool = False) -> str:
    picture = Pillow.effect_noise((width, height), 80) if noise else Pillow.new("RGB", (width, height), colour)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def part(url: Any) -> Json:
    return {"type": "image_url", "image_url": {"url": url}}


def post(served: Served, route: str, body: Json) -> tuple[int, Json]:
    request = urllib.request.Request(
        served.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def chat(served: Served, *parts: Any, **more: Any) -> tuple[int, Json]:
    body = {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 6, "temperature": 0, **more}
    return post(served, "/v1/chat/completions", body)


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def test_usage_counts_image_tokens(seeing: Served) -> None:
    counts = {}
    for name, parts in {
        "none": [text("What is it?")],
        "one": [part(url_of()), text("What is it?")],
        "large": [part(url_of(290, 290)), text("What is it?")],
        "two": [part(url_of()), part(url_of(colour="blue")), text("What is it?")],
    }.items():
        status, answer = chat(seeing, *parts)
        assert status == 200, answer
        counts[name] = answer["usage"]["prompt_tokens"]
    assert counts["one"] == counts["none"] + 4 + 2, "four patches and the two marks around them"
    assert counts["large"] == counts["none"] + 100 + 2
    assert counts["two"] == counts["none"] + 2 * 6


def test_other_forms_of_the_same(seeing: Served) -> None:
    asked = {"return_token_ids": True, "ignore_eos": True, "n": 2}
    url = url_of()
    answers = [
        chat(seeing, picture, text("What?"), **asked)
        for picture in (part(url), {"type": "image_url", "image_url": url}, {"type": "input_image", "image_url": url})
    ]
    assert [status for status, _ in answers] == [200] * 3
    texts = [[choice["token_ids"] for choice in answer["choices"]] for _, answer in answers]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] == texts[0][1]
    other = chat(seeing, part(url_of(colour="green")), text("What?"), **asked)[1]
    assert [choice["token_ids"] for choice in other["choices"]] != texts[0]


def test_tokenize_counts_them_too(seeing: Served) -> None:
    messages = [{"role": "user", "content": [part(url_of()), text("What is it?")]}]
    status, tokens = post(seeing, "/tokenize", {"messages": messages})
    assert status == 200, tokens
    assert tokens["count"] == chat(seeing, part(url_of()), text("What is it?"))[1]["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([part("data:image/png;base64,!!")], "messages.0.content.0: the data URL is not valid base64"),
        ([text("x"), part("data:image/png;base64,aGVsbG8=")], "messages.0.content.1: these 5 bytes are no PNG"),
        ([part("http://127.0.0.1:1/x.png")], "127.0.0.1 is no public address (--allow-private-media"),
        ([part("http://169.254.169.254/latest/meta-data/")], "169.254.169.254 is no public address"),
        ([part("http://[::ffff:127.0.0.1]/x")], "is no public address"),
        ([part("http://localhost:1/x.png")], "which is no public address"),
        ([part("file:///etc/passwd")], "give an http, https or data URL"),
        ([part(url_of(200, 200, noise=True))], "larger than 20000 bytes (--max-media-bytes)"),
        ([part(url_of(400, 400))], "400 x 400 pixels, more than 90000 (--max-image-pixels)"),
        ([part(url_of())] * 3, "the request holds 3 images, at most 2 may be given (--limit-mm-per-prompt image=2)"),
        ([part(7)], "messages.0.content.0.image_url.url must be a string"),
        ([{"type": "image_url"}], "messages.0.content.0.image_url.url must be a string"),
        ([{"type": "video_url", "video_url": {"url": "x"}}], "the model `tiny` takes text, input_text, image_url"),
        ([part(url_of()), text("and <|image_pad|>")], "2 image tokens stand in the prompt of 1 images"),
    ],
)
def test_refusals(seeing: Served, parts: list[Json], words: str) -> None:
    status, answer = chat(seeing, *parts)
    assert status == 400, answer
    assert words in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 400


def test_a_prompt_with_images_is_not_cut(seeing: Served) -> None:
    status, answer = chat(seeing, part(url_of()), text("What is it?"), truncate_prompt_tokens=5)
    assert (status, answer["error"]["param"]) == (400, "truncate_prompt_tokens")
    assert chat(seeing, part(url_of()), text("What is it?"), truncate_prompt_tokens=200)[0] == 200


def test_images_do_not_excuse_a_prompt_that_is_too_long(seeing: Served) -> None:
    status, answer = chat(seeing, part(url_of(290, 290)), part(url_of(290, 280)), text("word " * 320))
    assert (status, answer["error"]["param"]) == (400, "input_tokens")


def test_a_completion_has_no_images(seeing: Served) -> None:
    for prompt in ("a <|image_pad|>", [20, 3, 30]):
        status, answer = post(seeing, "/v1/completions", {"prompt": prompt, "max_tokens": 2})
        assert status == 400
        assert "give images to /v1/chat/completions" in answer["error"]["message"]


def test_all_faults_leave_nothing_running(seeing: Served) -> None:
    """One bad image among good ones: the others are not waited for, and the next request is served."""
    assert chat(seeing, part(url_of()), part("data:,x"), text("?"))[0] == 400
    assert chat(seeing, part(url_of()), part(url_of()), text("?"))[0] == 200


def test_a_model_without_eyes_says_so(served: Served) -> None:
    status, answer = chat(served, text("What is it?"), part(url_of()))
    assert status == 400
    assert answer["error"]["message"] == ("messages.0.content.1: the model `tiny` takes text only, not 'image_url'")

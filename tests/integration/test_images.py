"""Seed 000 for real: its own request, with an image, to a prefiller and a decoder behind pd-proxy."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image as Pillow

from tests.integration.deployment import Deployment, make_model, metric
from tests.integration.greedy import Answer, Prompt, ask

ENCODED = "baton_engine_images_encoded_total"
SEED_BODY = """
{
        "model": "qwen25vl",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "https://modelscope.oss-cn-beijing.aliyuncs.com/resource/qwen.png"}},
                {"type": "text", "text": "What is the text in the illustration?"}
            ]}
            ],
        "max_completion_tokens": 100,
        "temperature": 0
    }
"""


def png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    picture = Pillow.linear_gradient("L").resize((width, height)).convert("RGB")
    file = io.BytesIO()
    Pillow.blend(picture, Pillow.new("RGB", picture.size, colour), 0.5).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen2_5_vl", "qwen2_5_vl")


@pytest.fixture(scope="module")
def image_host() -> Iterator[str]:
    """Serves one picture at any path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = png(280, 140, (200, 30, 60))
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def seeds_request(image_url: str) -> Prompt:
    """The seed's body, with the served model's name and an image that can be had here."""
    body = json.loads(SEED_BODY)
    del body["model"]
    body["messages"][1]["content"][0]["image_url"]["url"] = image_url
    return Prompt(True, {**body, "ignore_eos": True, "max_completion_tokens": 24, "max_tokens": None}, None)


def with_parts(*parts: dict[str, Any] | str) -> Prompt:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return Prompt(True, {"messages": [{"role": "user", "content": content}]}, None)


def image(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


@pytest.mark.parametrize("contract", ["pull", "layerwise"])
async def test_the_seeds_request_split_and_unsplit(model: Path, image_host: str, contract: str) -> None:
    red, blue = png(280, 140, (200, 30, 60)), png(100, 330, (10, 60, 220))
    asked = [
        seeds_request(f"{image_host}/resource/qwen.png"),
        seeds_request(data_url(red)),
        seeds_request(data_url(png(280, 140, (30, 200, 60)))),
        with_parts("Compare", image(red), "with", image(blue), "please."),
        with_parts("No picture here."),
    ]
    flags = ["--no-enable-prefix-caching", "--allow-private-media", "--max-num-batched-tokens", "50"]
    with Deployment(model, engine_args=flags, proxy_args=["--contract", contract]) as split:
        decoder_url, timeout = split.decoders[0].url, aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            alone = [await ask(session, split.prefillers[0].url, one, stream=False) for one in asked]
            assert_sensible(alone)
            for stream in (False, True):
                answers = [await ask(session, split.url, one, stream=stream) for one in asked]
                assert answers == alone
            assert metric(decoder_url, ENCODED) == 0, "the decoder looked at an image whose KV it had"
            pulled = metric(decoder_url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
            assert pulled == 2 * sum(one.num_prompt_tokens - 1 for one in alone)
            await assert_refusals(session, split.url)
        assert split.settles(within_s=5) == {}


def assert_sensible(alone: list[Answer]) -> None:
    by_url, by_data, green, two, none = alone
    assert by_url == by_data
    assert by_url.num_prompt_tokens == green.num_prompt_tokens > 50, "an image counts with all its tokens"
    assert by_url.text != green.text
    assert two.num_prompt_tokens > by_url.num_prompt_tokens > none.num_prompt_tokens


async def assert_refusals(session: aiohttp.ClientSession, url: str) -> None:
    """A client's fault stays a client's fault on its way through the proxy."""
    for part, words in (
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}}, "not valid base64"),
        ({"type": "image_url", "image_url": {"url": data_url(b"GIF89a no")}}, "messages.0.content.0"),
        ({"type": "video_url", "video_url": {"url": "x"}}, "video_url"),
    ):
        body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}], "max_tokens": 4}
        async with session.post(url + "/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 400, answer
            assert words in answer["error"]["message"]

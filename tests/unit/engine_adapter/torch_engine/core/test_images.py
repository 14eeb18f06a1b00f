"""A model that sees, in float32: the text of transformers' own `generate`, bits that depend on the prompt alone."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from engine_adapter.kv_transfer_params import IMAGES_KEY
from engine_adapter.torch_engine.image_processor import ImageProcessor
from engine_adapter.torch_engine.model_loader import LoadedModel
from engine_adapter.torch_engine.prompt_images import Image, PromptImages, expand
from engine_adapter.torch_engine.sequence import EngineRequest
from tests.unit.engine_adapter.torch_engine.core.harness import (
    CoreHarness,
    ask,
    greedy,
    linked_pair,
    random_prompt,
)
from tests.unit.engine_adapter.torch_engine.core.test_batch_invariance import assert_same_bits

IMAGE_TOKEN = 3
FAMILY = "qwen2_5_vl"
SIZES = {"wide": (200, 120), "tall": (90, 300), "small": (30, 30), "large": (448, 448)}
PROMPTS: dict[str, list[str | int]] = {
    "image first": ["wide", 20],
    "image in the middle": [37, "tall", 9],
    "two images": [4, "wide", 5, "tall", 30],
    "neighbours": [10, "small", "wide", 3],
    "one image twice": [3, "small", 40, "small", 3],
    "image last": [6, "small"],
    "text only": [50],
}
NOT_TRANSFORMERS = ("neighbours",)
"""transformers takes two images with nothing in between for one."""
NUM_TOKENS = 12


@lru_cache
def picture(name: str, seed: int = 0) -> bytes:
    width, height = SIZES[name]
    pixels = random.Random(f"{name}{seed}").randbytes(width * height * 3)
    file = io.BytesIO()
    Pillow.frombytes("RGB", (width, height), pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor(model_dir: Callable[[str, str], Path]) -> ImageProcessor:
    return ImageProcessor.load(model_dir(FAMILY, "tiny"), 10**6)


@pytest.fixture
def model(loaded: Callable[[str, str], LoadedModel]) -> LoadedModel:
    return loaded(FAMILY, "tiny")


def parts_of(words: list[str | int]) -> list[int]:
    """Token ids of a prompt, one image token an image."""
    token_ids: list[int] = []
    for index, word in enumerate(words):
        more = [IMAGE_TOKEN] if isinstance(word, str) else [10 + n % 900 for n in random_prompt(word, index)]
        token_ids += more
    return token_ids


def images_of(processor: ImageProcessor, words: list[str | int], seed: int = 0) -> list[Image]:
    return [processor.read(picture(word, seed)) for word in words if isinstance(word, str)]


def request(
    processor: ImageProcessor, name: str, request_id: str = "", seed: int = 0, max_tokens: int = NUM_TOKENS, **more: Any
) -> EngineRequest:
    words = PROMPTS[name]
    images = images_of(processor, words, seed)
    token_ids, starts = expand(parts_of(words), IMAGE_TOKEN, images)
    placed = PromptImages(images, starts, processor.merge_size) if images else None
    return ask(request_id or name, token_ids, greedy(max_tokens), images=placed, **more)


def alone(model: LoadedModel, *requests: EngineRequest) -> CoreHarness:
    harness = CoreHarness(model, enable_prefix_caching=False)
    for one in requests:
        harness.run(one)
    return harness


def test_text_equals_transformers(
    model_dir: Callable[[str, str], Path], model: LoadedModel, processor: ImageProcessor
) -> None:
    directory = model_dir(FAMILY, "tiny")
    reference: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    transformers_processor: Any = AutoImageProcessor.from_pretrained(directory, backend="pil")
    harness = CoreHarness(model)
    seen = set()
    for name, words in PROMPTS.items():
        asked = request(processor, name)
        token_ids = torch.tensor([asked.prompt_token_ids])
        given: dict[str, Any] = {}
        pictures = [Pillow.open(io.BytesIO(picture(word))) for word in words if isinstance(word, str)]
        if pictures:
            types = (token_ids == IMAGE_TOKEN).int()
            given = {**transformers_processor(images=pictures, return_tensors="pt"), "mm_token_type_ids": types}
            if name not in NOT_TRANSFORMERS:
                positions, delta = reference.model.get_rope_index(token_ids, types, given["image_grid_thw"])
                assert asked.images is not None
                assert positions[:, 0].tolist() == asked.images.positions(0, len(asked.prompt_token_ids))
                assert delta.item() == asked.images.delta
        if name in (*NOT_TRANSFORMERS, "image last"):  # generate goes on from the last token on each axis by itself
            continue
        expected = reference.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            **given,
        )
        harness.run(asked)
        assert harness.token_ids(name) == expected[0, token_ids.shape[1] :].tolist(), name
        seen.add(tuple(harness.token_ids(name)))
    assert len(seen) == len(PROMPTS) - 2
    harness.assert_idle()


def test_another_image_gives_another_text(model: LoadedModel, processor: ImageProcessor) -> None:
    one, other = (request(processor, "image first", f"s{seed}", seed) for seed in (0, 1))
    assert one.prompt_token_ids == other.prompt_token_ids
    harness = alone(model, one, other)
    assert harness.token_ids("s0") != harness.token_ids("s1")


@pytest.mark.parametrize("max_num_batched_tokens", [7, 50])
def test_chunk_borders_inside_images(
    model: LoadedModel, processor: ImageProcessor, max_num_batched_tokens: int
) -> None:
    names = ["image in the middle", "two images", "neighbours", "image last"]
    chunked = CoreHarness(model, max_num_batched_tokens=max_num_batched_tokens)
    chunked.run(*(request(processor, name) for name in names))
    assert_same_bits(alone(model, *(request(processor, name) for name in names)), chunked)


def test_blocks_of_different_images_are_never_shared(model: LoadedModel, processor: ImageProcessor) -> None:
    name = "image in the middle"
    first, same, other = (request(processor, name, request_id, seed) for request_id, seed in
                          (("first", 0), ("same", 0), ("other", 1)))  # fmt: skip
    harness = CoreHarness(model)
    harness.run(first)
    harness.run(same)
    harness.run(other)
    num_prefilled = len(first.prompt_token_ids) - 1
    assert harness.last("same").num_cached_tokens == num_prefilled // 16 * 16
    assert harness.last("other").num_cached_tokens == 32, "the text before the image, in whole blocks"
    again = [request(processor, name, request_id, seed) for request_id, seed in (("same", 0), ("other", 1))]
    reference = alone(model, *again)
    for request_id in ("same", "other"):
        assert harness.token_ids(request_id) == reference.token_ids(request_id)
        assert torch.equal(harness.kv_of[request_id], reference.kv_of[request_id])


def test_preempted_or_not(model: LoadedModel, processor: ImageProcessor) -> None:
    asked = ("image first", "two images", "image in the middle")
    tight = CoreHarness(model, num_blocks=19)
    tight.run(*(request(processor, name, max_tokens=40) for name in asked))
    assert tight.scheduler.num_preemptions > 0
    assert_same_bits(alone(model, *(request(processor, name, max_tokens=40) for name in asked)), tight)
    tight.assert_idle()


def prefilled(producer: CoreHarness, one: EngineRequest) -> dict[str, Any]:
    one.kv_transfer_params, one.sampling = {"do_remote_decode": True}, greedy(1, min_tokens=1)
    producer.run(one)
    params = producer.last(one.request_id).kv_transfer_params
    assert params is not None
    return params


@pytest.mark.parametrize("name", ["image first", "two images"])
def test_a_decoder_does_not_look_at_the_image(model: LoadedModel, processor: ImageProcessor, name: str) -> None:
    reference = alone(model, request(processor, name, "d"))
    producer, consumer = linked_pair(model)
    params = prefilled(producer, request(processor, name, "p"))
    assert model.vision is not None
    num_encoded = model.vision.num_encoded
    model.vision._features.clear()
    consumer.core.add(request(processor, name, "d", kv_transfer_params=params))
    consumer.step()
    consumer.transfer.finish_pulls()
    consumer.run()
    assert_same_bits(reference, consumer)
    assert model.vision.num_encoded == num_encoded
    assert consumer.core.counters.num_prompt_tokens_local_compute == 1


def test_a_prompt_that_ends_with_an_image(model: LoadedModel, processor: ImageProcessor) -> None:
    """Its last token is an image's and is decoded: the one case in which a decoder has to look."""
    producer, consumer = linked_pair(model)
    params = prefilled(producer, request(processor, "image last", "p"))
    consumer.core.add(request(processor, "image last", "d", kv_transfer_params=params))
    consumer.step()
    consumer.transfer.finish_pulls()
    consumer.run()
    assert_same_bits(alone(model, request(processor, "image last", "d")), consumer)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_kv_of_another_image_is_not_taken(model: LoadedModel, processor: ImageProcessor, policy: str) -> None:
    """The image behind a URL changed between prefill and decode."""
    producer, consumer = linked_pair(model, kv_load_failure_policy=policy)
    params = prefilled(producer, request(processor, "image first", "p"))
    assert len(params[IMAGES_KEY]) == 1
    consumer.run(request(processor, "image first", "d", seed=1, kv_transfer_params=params))
    assert consumer.transfer.dropped == ["p"]
    if policy == "fail":
        error = consumer.last("d").error
        assert error is not None
        assert (error.status, error.error_type) == (503, "kv_load_error")
    else:
        assert_same_bits(alone(model, request(processor, "image first", "d", seed=1)), consumer)
    producer.step()
    producer.assert_idle()
    consumer.assert_idle()


def test_nothing_is_pushed_to_a_decoder_that_has_other_images(model: LoadedModel, processor: ImageProcessor) -> None:
    producer, _ = linked_pair(model)
    one, other = (request(processor, "image first", f"p{seed}", seed) for seed in (0, 1))
    num_tokens = len(one.prompt_token_ids)
    baton = {"landing_id": "x", "num_tokens": num_tokens, "num_blocks": -(-(num_tokens - 1) // 16)}
    landing = {"do_remote_decode": True, "remote_request_id": "d", "baton": baton, IMAGES_KEY: one.image_hashes}
    other.kv_transfer_params = landing
    producer.run(other)
    error = producer.last("p1").error
    assert error is not None
    assert (error.status, "other images" in error.message) == (503, True)
    producer.assert_idle()


def test_features_are_kept_within_their_bytes(model: LoadedModel, processor: ImageProcessor) -> None:
    assert model.vision is not None
    tower = type(model.vision)(model.vision._tower, torch.device("cpu"), kept_bytes=1)
    one, other = images_of(processor, ["wide", "tall"])
    for image in (one, one, other, one):
        assert tower.features(image).shape == (image.num_tokens, 128)
    assert tower.num_encoded == 3
    assert len(tower._features) == 1


def test_features_are_the_same_with_any_number_of_threads(model: LoadedModel, processor: ImageProcessor) -> None:
    """A prefiller and a decoder that computes the prompt itself may have different numbers of cores."""
    assert model.vision is not None
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        model.vision._features.clear()
        found.append(model.vision.features(images_of(processor, ["large"])[0]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image as Pillow

from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.image_processor import ImageProcessor, NotAnImage
from engine_adapter.torch_engine.make_model import IMAGE_PROCESSOR


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    return load(tmp_path_factory.mktemp("processor"), str(IMAGE_PROCESSOR).replace("'", '"').replace("True", "true"))


def load(directory: Path, settings: str) -> ImageProcessor:
    (directory / "preprocessor_config.json").write_text(settings)
    return ImageProcessor.load(directory, 1000 * 1000)


def encoded(picture: Pillow.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format(processor: ImageProcessor, form: str) -> None:
    image = processor.read(encoded(Pillow.new("RGB", (200, 120), (255, 0, 0)), form))
    assert image.grid == (1, 8, 14)
    assert image.num_tokens == 28
    assert image.pixels().shape == (8 * 14, 3 * 2 * 14 * 14)


@pytest.mark.parametrize("size", [(1, 1), (30, 30), (57, 199), (640, 480), (999, 1000), (10, 1000)])
def test_the_grid_is_known_without_the_pixels(processor: ImageProcessor, size: tuple[int, int]) -> None:
    image = processor.read(encoded(Pillow.new("RGB", size)))
    assert image.pixels().shape[0] == image.grid[1] * image.grid[2] == image.num_tokens * 4
    assert image.num_tokens <= 256


def test_what_is_transparent_is_white(processor: ImageProcessor) -> None:
    clear = processor.read(encoded(Pillow.new("RGBA", (56, 56), (0, 0, 0, 0)))).pixels()
    white = processor.read(encoded(Pillow.new("RGB", (56, 56), (255, 255, 255)))).pixels()
    assert (clear == white).all()
    for mode in ("L", "1", "P", "CMYK", "I;16", "LA"):
        picture = Pillow.new(mode, (56, 56))
        assert processor.read(encoded(picture, "JPEG" if mode == "CMYK" else "PNG")).num_tokens == 4


def test_who_an_image_is(processor: ImageProcessor, tmp_path: Path) -> None:
    red, blue = (encoded(Pillow.new("RGB", (56, 56), colour)) for colour in ("red", "blue"))
    assert processor.read(red).content_hash == processor.read(red).content_hash != processor.read(blue).content_hash
    other = load(tmp_path, str(IMAGE_PROCESSOR | {"image_mean": [0, 0, 0]}).replace("'", '"').replace("True", "true"))
    assert other.read(red).content_hash != processor.read(red).content_hash


def bomb(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_the_limit_of_pixels(processor: ImageProcessor) -> None:
    assert processor.read(encoded(Pillow.new("RGB", (1000, 1000)))).num_tokens <= 256
    for content in (encoded(Pillow.new("RGB", (1001, 1000))), bomb(10_000, 10_000), bomb(60_000, 60_000)):
        with pytest.raises(NotAnImage, match=r"--max-image-pixels|can't be opened"):
            processor.read(content)


def test_what_is_no_image(processor: ImageProcessor) -> None:
    whole = encoded(Pillow.effect_noise((300, 200), 50).convert("RGB"))
    cases: dict[bytes, str] = {
        b"": "these 0 bytes are no PNG, JPEG, WEBP, GIF or BMP",
        b"<html>": "are no PNG",
        b"GIF89a no": "it can't be|are no",
        whole[: len(whole) // 2]: "can't be decoded",
        encoded(Pillow.new("RGB", (50, 50)), "TIFF"): "are no PNG",
        encoded(Pillow.new("RGB", (1, 400))): "aspect ratio",
    }
    for content, words in cases.items():
        with pytest.raises(NotAnImage, match=words):
            processor.read(content)


def test_a_directory_without_settings(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="no image processor") as caught:
        ImageProcessor.load(tmp_path, 1000)
    assert "preprocessor_config.json" in caught.value.remedy

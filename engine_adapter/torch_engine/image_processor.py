"""From the bytes of a picture file to an Image: Pillow decodes it, transformers resizes and cuts it into patches."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from transformers import AutoImageProcessor

from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.prompt_images import Grid, Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What may be decoded; each decoder is code that strangers' bytes go through."""


class NotAnImage(ValueError):
    """These bytes are no picture that can be shown to the model; the message says why."""


class ImageProcessor:
    """Thread-safe: decoding and resizing take long, and are done off the event loop."""

    def __init__(self, processor: Any, settings: bytes, max_pixels: int) -> None:
        """`settings` are part of an image's identity: another size or other means give other features."""
        self.merge_size = int(processor.merge_size)
        self._processor = processor
        self._settings_digest = hashlib.sha256(settings).digest()
        self._max_pixels = max_pixels
        self._smart_resize: Any = vars(sys.modules[type(processor).__module__])["smart_resize"]

    @classmethod
    def load(cls, model_dir: Path, max_pixels: int) -> ImageProcessor:
        """Raises EngineStartError where the directory has no usable image processor."""
        path = model_dir / "preprocessor_config.json"
        try:
            settings = json.dumps(json.loads(path.read_bytes()), sort_keys=True).encode()
            kind: Any = AutoImageProcessor
            processor = kind.from_pretrained(model_dir, backend="pil", local_files_only=True)
            return cls(processor, settings, max_pixels)
        except Exception as error:  # transformers raises whatever its readers meet: OSError, ValueError, KeyError, ...
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EngineStartError(
                f"no image processor can be read from {model_dir} ({reason})",
                "copy the model's preprocessor_config.json there",
            ) from error

    def read(self, content: bytes) -> Image:
        """Decode a file wholly, so that a torn one is found now. Raises NotAnImage."""
        picture = self._decode(content)
        try:
            grid = self._grid_of(*picture.size)
        except ValueError as error:  # smart_resize: too long and thin
            raise NotAnImage(str(error)) from error
        return Image(
            grid=grid,
            content_hash=hashlib.sha256(self._settings_digest + content).digest(),
            num_tokens=grid[0] * grid[1] * grid[2] // self.merge_size**2,
            pixels=Pixels(self._processor, picture),
        )

    def _decode(self, content: bytes) -> Pillow.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of sizes; the limit is ours, below
                picture = Pillow.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise NotAnImage(f"these {len(content)} bytes are no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
            raise NotAnImage(f"it can't be opened ({_first_line(error)})") from error
        width, height = picture.size
        if width * height > self._max_pixels:
            raise NotAnImage(f"it has {width} x {height} pixels, more than {self._max_pixels} (--max-image-pixels)")
        try:
            picture.load()
            return _as_rgb(picture)
        except Exception as error:  # Pillow's decoders raise whatever they meet in a torn file
            raise NotAnImage(f"it can't be decoded ({_first_line(error)})") from error

    def _grid_of(self, width: int, height: int) -> Grid:
        """Patches that the picture becomes: by transformers' own rule, so that a decoder need not resize anything."""
        unit = int(self._processor.patch_size)
        if self._processor.do_resize:
            size = self._processor.size
            height, width = self._smart_resize(
                height,
                width,
                factor=unit * self.merge_size,
                min_pixels=size["shortest_edge"],
                max_pixels=size["longest_edge"],
            )
        return 1, height // unit, width // unit


class Pixels:
    """The patches of one picture. Computed ahead for a prefill, by whoever calls `prepare`, and given away once."""

    def __init__(self, processor: Any, picture: Pillow.Image) -> None:
        self._processor = processor
        self._picture = picture
        self._ready: Any = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        with self._lock:
            if self._ready is None:
                self._ready = self._compute()

    def __call__(self) -> Any:
        """[patches, channels of a patch], float32; the picture is kept, for a prefill that has to be done again."""
        with self._lock:
            ready, self._ready = self._ready, None
        return self._compute() if ready is None else ready

    def _compute(self) -> Any:
        return self._processor(images=[self._picture], return_tensors="pt")["pixel_values"]


def _as_rgb(picture: Pillow.Image) -> Pillow.Image:
    """The first frame; what is transparent becomes white, as in vLLM."""
    if picture.mode == "RGB":
        return picture
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        paper = Pillow.new("RGBA", layer.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(paper, layer).convert("RGB")
    return picture.convert("RGB")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""The images of a chat request: fetched, decoded, counted, and put into the prompt's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.content_parts import ImageSource
from engine_adapter.torch_engine.image_processor import ImageProcessor, NotAnImage, Pixels
from engine_adapter.torch_engine.media_fetcher import MediaError, MediaFetcher, MediaLimits, Room
from engine_adapter.torch_engine.prompt_images import Image, PromptImages, expand
from engine_adapter.torch_engine.server_config import ServerConfig

MAX_DECODERS = 4
"""Pictures decoded at a time: each may take --max-image-pixels times some bytes, and a core."""


@dataclass(slots=True)
class ImageReader:
    """What a server needs to take images for a model that sees."""

    processor: ImageProcessor
    fetcher: MediaFetcher
    image_token_id: int
    max_images: int
    decoders: asyncio.Semaphore

    @classmethod
    def of(cls, model_dir: Path, image_token_id: int, config: ServerConfig) -> ImageReader:
        """Raises EngineStartError where the model's image processor can't be read."""
        limits = MediaLimits(
            max_bytes=config.max_media_bytes,
            timeout_s=config.media_fetch_timeout_s,
            allowed_domains=config.allowed_media_domains,
            allow_private=config.allow_private_media,
        )
        processor = ImageProcessor.load(model_dir, config.max_image_pixels)
        decoders = asyncio.Semaphore(MAX_DECODERS)
        return cls(processor, MediaFetcher(limits), image_token_id, config.max_images, decoders)

    async def read(self, sources: Sequence[ImageSource], *, prepare: bool) -> list[Image]:
        """One image a source. `prepare`: a prefill will need their pixels. Raises ApiError, which names the part."""
        if len(sources) > self.max_images:
            raise ApiError(
                f"the request holds {len(sources)} images, at most {self.max_images} may be given "
                f"(--limit-mm-per-prompt image={self.max_images})",
                param=sources[self.max_images].field,
            )
        room = Room(self.fetcher.limits.max_bytes)
        once = {source.url: source for source in reversed(sources)}
        reads = {url: asyncio.ensure_future(self._read_one(source, room, prepare)) for url, source in once.items()}
        try:
            await asyncio.gather(*reads.values())
        finally:
            for read in reads.values():
                read.cancel()
        return [reads[source.url].result() for source in sources]

    async def _read_one(self, source: ImageSource, room: Room, prepare: bool) -> Image:
        try:
            content = await self.fetcher.fetch(source.url, room)
            async with self.decoders:
                return await asyncio.to_thread(self._decode, content, prepare)
        except (MediaError, NotAnImage) as error:
            raise ApiError(f"{source.field}: {error}", param=source.field) from error

    def _decode(self, content: bytes, prepare: bool) -> Image:
        image = self.processor.read(content)
        if prepare and isinstance(image.pixels, Pixels):
            image.pixels.prepare()
        return image

    def place(self, token_ids: Sequence[int], images: Sequence[Image]) -> tuple[list[int], PromptImages]:
        """The prompt's tokens with room for every image. Raises ApiError."""
        try:
            expanded, starts = expand(token_ids, self.image_token_id, images)
        except ValueError as error:
            raise ApiError(
                f"{error}: the text of a message may not hold the image token, and the chat template has to place each "
                "image once",
                param="messages",
            ) from error
        return expanded, PromptImages(images, starts, self.processor.merge_size)

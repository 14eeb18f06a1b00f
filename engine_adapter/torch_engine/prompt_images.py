"""The images of a prompt: where they stand in it, who they are, and the positions that they give its tokens. Pure.

Qwen2.5-VL counts positions on three axes, time, height and width (M-RoPE). A text token has the same number on each and
is one further than all before it. The tokens of an image share one place in time and spread over height and width from
there, so an image of 8 x 14 merged patches takes 112 tokens but only 14 positions. `PromptImages.delta` is what that
leaves between a token's place and its position behind the last image; it follows from the places and the grids alone,
so a decoder that pulled the prompt's KV has it without looking at any pixel.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Grid = tuple[int, int, int]
"""Patches in time, height and width, before they are merged."""


@dataclass(eq=False, slots=True)
class Image:
    """One image as the engine takes it. `pixels` gives the patches [patches, channels of a patch] when they are needed.

    `content_hash` names what the vision tower would be shown: equal hashes, equal features.
    """

    grid: Grid
    content_hash: bytes
    num_tokens: int
    pixels: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image at the prompt's tokens [start, end), and the first of its positions."""

    image: Image
    start: int
    first_position: int

    @property
    def end(self) -> int:
        return self.start + self.image.num_tokens


class PromptImages:
    """The images of one prompt, in order."""

    def __init__(self, images: Sequence[Image], starts: Sequence[int], merge_size: int) -> None:
        """`starts[i]`: the place of image i's first token in the expanded prompt."""
        self._merge_size = merge_size
        self._starts = list(starts)
        self.placed: list[PlacedImage] = []
        shift = 0
        self._shifts = []
        """Position minus place of the text behind image i."""
        for image, start in zip(images, starts, strict=True):
            self.placed.append(PlacedImage(image, start, start + shift))
            shift += max(image.grid[1], image.grid[2]) // merge_size - image.num_tokens
            self._shifts.append(shift)

    @property
    def delta(self) -> int:
        """Position minus place of a token behind the last image."""
        return self._shifts[-1] if self._shifts else 0

    @property
    def hashes(self) -> list[str]:
        return [placed.image.content_hash.hex() for placed in self.placed]

    def position_of(self, place: int) -> tuple[int, int, int]:
        """Time, height and width of the token at `place`."""
        index = bisect_right(self._starts, place) - 1
        if index < 0:
            return place, place, place
        placed = self.placed[index]
        if place >= placed.end:
            position = place + self._shifts[index]
            return position, position, position
        _, num_rows, num_columns = (size // self._merge_size for size in placed.image.grid)
        row, column = divmod(place - placed.start, num_columns)
        first = placed.first_position
        return first + row // num_rows, first + row % num_rows, first + column

    def positions(self, start: int, end: int) -> list[list[int]]:
        """Times, heights and widths of the places [start, end)."""
        return [list(axis) for axis in zip(*map(self.position_of, range(start, end)), strict=True)]

    def within(self, start: int, end: int) -> list[PlacedImage]:
        """The images with tokens among the places [start, end)."""
        return [placed for placed in self.placed if placed.start < end and start < placed.end]

    def key_of(self, start: int, end: int) -> bytes:
        """What beside its token ids makes the content of a block that covers [start, end); empty without images."""
        here = self.within(start, end)
        if not here:
            return b""
        return hashlib.sha256(b"".join(placed.image.content_hash for placed in here)).digest()


def expand(token_ids: Sequence[int], image_token_id: int, images: Sequence[Image]) -> tuple[list[int], list[int]]:
    """The prompt with each image's one token repeated as often as it has tokens, and where each image begins.

    Raises ValueError where the prompt has another number of image tokens than there are images.
    """
    num_found = sum(token_id == image_token_id for token_id in token_ids)
    if num_found != len(images):
        raise ValueError(f"{num_found} image tokens stand in the prompt of {len(images)} images")
    expanded: list[int] = []
    starts: list[int] = []
    for token_id in token_ids:
        if token_id == image_token_id:
            starts.append(len(expanded))
            expanded += [token_id] * images[len(starts) - 1].num_tokens
        else:
            expanded.append(token_id)
    return expanded, starts

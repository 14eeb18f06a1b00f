"""Where prefill forwards begin and end. Pure.

A prefill forward always covers one tile of one sequence: a fixed range of absolute positions, whatever part of it is
wanted. All its shapes are then a function of the position alone, and so are its bits, however the scheduler cuts the
prompt and wherever a cached prefix ends. Tiles grow from 32 to the device's largest, so that a short prompt does not
pay for a long tile: [0,32) [32,64) [64,128) [128,256) [256,384) and so on for a largest of 128.
"""

from __future__ import annotations

from collections.abc import Iterator

SMALLEST_TILE = 32
"""On CPU a forward of 32 rows costs a third more than one of 16."""


def tile_of(position: int, max_tile: int) -> tuple[int, int]:
    """The tile [start, end) that holds `position`. `max_tile` is a power of two, at least SMALLEST_TILE."""
    if position < SMALLEST_TILE:
        return 0, SMALLEST_TILE
    size = min(max_tile, 1 << (position.bit_length() - 1))
    start = position - position % size
    return start, start + size


def tiles_of(start: int, end: int, max_tile: int) -> Iterator[tuple[int, int]]:
    """The tiles that cover positions [start, end), in order."""
    while start < end:
        tile = tile_of(start, max_tile)
        yield tile
        start = tile[1]

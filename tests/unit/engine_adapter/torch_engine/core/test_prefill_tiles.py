from __future__ import annotations

import pytest

from engine_adapter.torch_engine.prefill_tiles import tile_of, tiles_of


@pytest.mark.parametrize("max_tile", [32, 128, 512])
def test_every_position_is_in_one_tile_that_depends_on_it_alone(max_tile: int) -> None:
    end = 0
    for position in range(3 * max_tile):
        tile = tile_of(position, max_tile)
        assert tile[0] <= position < tile[1]
        assert tile[1] - tile[0] <= max_tile
        if position == end:
            assert tile[0] == end
            end = tile[1]
        assert tile[1] == end


def test_tiles_grow_with_the_prompt() -> None:
    assert list(tiles_of(0, 300, 128)) == [(0, 32), (32, 64), (64, 128), (128, 256), (256, 384)]


def test_a_part_of_a_tile_needs_the_whole_one() -> None:
    assert list(tiles_of(100, 130, 128)) == [(64, 128), (128, 256)]
    assert list(tiles_of(5, 5, 128)) == []

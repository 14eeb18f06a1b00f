"""How often a push's progress is told. Pure."""

from __future__ import annotations

MIN_MARK_BYTES = 256 * 1024
"""A mark costs some 50 us in three processes: as much as copying this."""


class MarkPace:
    """Of one push. `layer_bytes`: of one block."""

    def __init__(self, layer_bytes: int) -> None:
        self._layer_bytes = layer_bytes
        self._num_unmarked_bytes = 0

    def is_due(self, num_blocks: int, *, last: bool = False) -> bool:
        """One more layer of so many blocks is computed: whether to say so now; `last` says it in any case."""
        self._num_unmarked_bytes += num_blocks * self._layer_bytes
        if self._num_unmarked_bytes < MIN_MARK_BYTES and not last:
            return False
        self._num_unmarked_bytes = 0
        return True

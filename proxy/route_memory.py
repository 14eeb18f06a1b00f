"""Which instances were found to lack which routes. Pure: time comes in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

FORGET_S = 60.0  # an engine that was restarted with another task may have the route now
MAX_ENTRIES = 4096


class RouteMemory:
    """The oldest entries go first when there are too many: paths come from clients."""

    def __init__(self) -> None:
        self._lacks: OrderedDict[tuple[Hashable, str, str], float] = OrderedDict()

    def lacks(self, instance: Hashable, method: str, path: str, now: float) -> bool:
        until = self._lacks.get((instance, method, path))
        return until is not None and now < until

    def note(self, instance: Hashable, method: str, path: str, now: float) -> None:
        key = (instance, method, path)
        self._lacks[key] = now + FORGET_S
        self._lacks.move_to_end(key)
        if len(self._lacks) > MAX_ENTRIES:
            self._lacks.popitem(last=False)

"""Threads for calls that may block for as long as a file system likes, fair between those who ask."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

Work = Callable[[], None]
JOIN_S = 1.0


class IoThreads:
    """`num_threads` daemon workers, which a hung call can neither keep from ending with the process nor be waited for.

    Each takes the next piece of work of the owner that has waited longest.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._waiting: OrderedDict[object, deque[Work]] = OrderedDict()
        self._condition = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, owner: object, work: Work) -> None:
        """Run `work` on a thread, after the owner's earlier pieces have begun; never once closed."""
        with self._condition:
            if not self._closing:
                self._waiting.setdefault(owner, deque()).append(work)
                self._condition.notify()

    def discard(self, owner: object) -> None:
        """Forget what of this owner's has not begun."""
        with self._condition:
            self._waiting.pop(owner, None)

    def close(self) -> None:
        """Begin nothing more, and wait a moment for what has begun."""
        with self._condition:
            self._closing = True
            self._waiting.clear()
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(JOIN_S)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._closing:
                    self._condition.wait()
                if self._closing:
                    return
                owner, pieces = self._waiting.popitem(last=False)
                work = pieces.popleft()
                if pieces:
                    self._waiting[owner] = pieces
            try:
                work()
            except Exception:  # the last resort: one failure must not cost a thread
                logger.exception("store_thread_failed")

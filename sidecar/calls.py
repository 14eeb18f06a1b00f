"""Questions to the sidecar that wait for their answers. Thread-safe."""

from __future__ import annotations

import threading

from sidecar.protocol import CallFailed, Landing, Offer, PoolRegistered

Answer = PoolRegistered | Offer | Landing | CallFailed


class Call:
    """A caller waiting; `answer` stays None where the connection ends before."""

    def __init__(self, call_id: int) -> None:
        self.call_id = call_id
        self.done = threading.Event()
        self.answer: Answer | None = None


class Calls:
    """Those of one connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, Call] = {}
        self._last_id = 0

    def begin(self) -> Call:
        with self._lock:
            self._last_id += 1
            call = self._open[self._last_id] = Call(self._last_id)
        return call

    def end(self, call: Call) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._open.pop(call.call_id, None)

    def answered(self, answer: Answer) -> None:
        """One that nobody waits for is dropped."""
        with self._lock:
            call = self._open.pop(answer.call_id, None)
        if call is not None:
            call.answer = answer
            call.done.set()

    def lose(self) -> None:
        """The connection has ended."""
        with self._lock:
            calls, self._open = self._open, {}
        for call in calls.values():
            call.done.set()

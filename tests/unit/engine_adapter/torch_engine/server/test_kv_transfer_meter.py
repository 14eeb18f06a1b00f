from __future__ import annotations

from typing import Any

from engine_adapter.torch_engine.kv_transfer import KvEvents, PullResult
from engine_adapter.torch_engine.kv_transfer_meter import MeteredKvTransfer


class Recorded:
    """Notes every call; the next poll returns `events`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.events = KvEvents()

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments))

    def offer(self, *arguments: Any) -> dict[str, Any]:
        self.calls.append(("offer", arguments))
        return {"offered": True}

    def poll(self) -> KvEvents:
        return self.events


def test_everything_is_passed_on_and_pulls_are_told() -> None:
    inner, told = Recorded(), list[PullResult]()
    transfer = MeteredKvTransfer(inner, told.append)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("check", ({},)), ("start_pull", ("r", {}, [1], 0)), ("offer", ("r", [1], 16, 0)), ("drop", ({},)),
        ("revoke", ("r",)), ("abandon", ("r",)), ("close", ()),
    ]  # fmt: skip
    answers = [getattr(transfer, name)(*arguments) for name, arguments in calls]
    assert inner.calls == calls
    assert answers[2] == {"offered": True}
    inner.events = KvEvents([PullResult("r", True), PullResult("s", False, "expired")], ["t"])
    assert transfer.poll() is inner.events
    assert told == inner.events.pulls

"""The other end of stage.LinkedEngine: a scripted engine on the same SidecarLink as the real ones.

It steps like an engine: polls its link, and between steps does what one line of JSON on standard input says.
"""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from engine_adapter.sidecar_link import SidecarLink
from sidecar.client import SidecarClient
from sidecar.errors import SidecarError
from sidecar.protocol import KvLayout, OfferEnded, PullEnded, PullSource

STEP_S = 0.02


class Engine:
    """`sys.argv`: the sidecar's socket, the pool's descriptor, its layout as JSON, the link's grace for a hung one."""

    def __init__(self, socket_path: str, fd: str, layout: str, fence_grace_s: str) -> None:
        kv_layout = msgspec.json.decode(layout, type=KvLayout)

        def enter(client: SidecarClient) -> str:
            return client.register_pool(int(fd), kv_layout)

        self.link = SidecarLink(socket_path, enter, lambda: None, float(fence_grace_s))
        self.pulls: dict[str, list[Any]] = {}
        self.offers: dict[str, str] = {}

    def step(self) -> None:
        for event in self.link.poll():
            if isinstance(event, PullEnded):
                self.pulls.setdefault(event.pull_id, []).append([event.ok, event.reason, event.message])
            elif isinstance(event, OfferEnded):
                self.offers[event.transfer_id] = event.outcome

    def offer(self, block_ids: list[int], ttl_s: float) -> object:
        client = self.link.client
        if client is None:
            return {"error": "the sidecar is away"}
        try:
            offer = client.offer("request", block_ids, 16 * len(block_ids), ttl_s)
        except SidecarError as error:
            return {"error": str(error)}
        hello = client.hello
        return msgspec.to_builtins(
            PullSource(
                hello.host, hello.port, hello.engine_id, offer.transfer_id, offer.token, offer.epoch, len(block_ids)
            )
        )

    def pull(self, pull_id: str, source: dict[str, Any], block_ids: list[int], deadline_s: float) -> None:
        self.link.pull(pull_id, [msgspec.convert(source, PullSource)], block_ids, 0, deadline_s)

    def revoke(self, transfer_id: str) -> None:
        self.link.revoke(transfer_id)

    def ended(self, pull_id: str) -> object:
        """Every report of this pull's end: there may be one at most."""
        return self.pulls.get(pull_id, [])

    def epoch(self) -> str:
        return self.link.epoch


def main() -> None:
    engine = Engine(*sys.argv[1:])
    engine.link.start()
    commands: dict[str, Callable[..., object]] = {
        name: getattr(engine, name) for name in ("offer", "pull", "revoke", "ended", "epoch")
    }
    print("ready", flush=True)
    while True:
        engine.step()
        if not select.select([sys.stdin], [], [], STEP_S)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            return
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), flush=True)


if __name__ == "__main__":
    main()

"""`pd-engine` that also writes down when a prompt is computed and when its KV moves; for bench.layerwise_engines.

    python -m bench.traced_engine TRACE serve --model DIR ...

Each event is a line at the end of the file TRACE, which engines may share: a name, and nanoseconds of CLOCK_MONOTONIC,
which is one clock for all processes of a machine. The engine itself is the real one.

    computed   the forward that computed the last of a prompt's KV has returned
    marked     a prefiller's engine has told its sidecar that more of a push is written
    pull       a decoder's engine has asked its sidecar for a prompt's KV
    land       likewise, for KV that will be pushed
    arrived    a decoder's engine thread knows that all of it is there
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from engine_adapter.torch_engine import cli
from engine_adapter.torch_engine.kv_transfer import KvEvents
from engine_adapter.torch_engine.model_runner import ModelRunner
from engine_adapter.torch_engine.scheduler import PrefillChunk
from engine_adapter.torch_engine.sidecar_kv_transfer import SidecarKvTransfer


def trace_into(path: str) -> None:
    """Stand before the engine's own methods."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(name: str) -> None:
        os.write(file, f"{name} {time.clock_gettime_ns(time.CLOCK_MONOTONIC)}\n".encode())

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            note(name)
            return method(*arguments)

        return noted

    prefill, poll = ModelRunner.prefill, SidecarKvTransfer.poll

    def noted_prefill(runner: ModelRunner, chunk: PrefillChunk, *callbacks: Any) -> None:
        prefill(runner, chunk, *callbacks)
        if chunk.end == chunk.sequence.num_prefill_tokens:
            note("computed")

    def noted_poll(transfer: SidecarKvTransfer) -> KvEvents:
        events = poll(transfer)
        for pull in events.pulls:
            note("arrived" if pull.ok else "failed")
        return events

    methods: list[tuple[type, str, Callable[..., Any]]] = [
        (ModelRunner, "prefill", noted_prefill),
        (SidecarKvTransfer, "poll", noted_poll),
        (SidecarKvTransfer, "start_pull", noting("pull", SidecarKvTransfer.start_pull)),
        (SidecarKvTransfer, "mark_ready", noting("marked", SidecarKvTransfer.mark_ready)),
        (SidecarKvTransfer, "land", noting("land", SidecarKvTransfer.land)),
    ]
    for owner, name, method in methods:
        setattr(owner, name, method)


if __name__ == "__main__":
    trace_into(sys.argv[1])
    sys.exit(cli.main(sys.argv[2:]))

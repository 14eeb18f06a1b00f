"""The other end of harness.EngineProcess."""

from __future__ import annotations

import json
import mmap
import os
import sys

import msgspec

from sidecar.client import SidecarClient
from sidecar.protocol import PullSource, StoreSave
from tests.sidecar_processes.harness import a_layout


def main() -> None:
    layout = a_layout()
    fd = os.memfd_create("engine-process", os.MFD_CLOEXEC)
    os.ftruncate(fd, layout.pool_bytes)
    pool = mmap.mmap(fd, layout.pool_bytes)
    pool[:] = b"\x07" * layout.pool_bytes
    client = SidecarClient.connect(sys.argv[1])
    client.register_pool(fd, layout)
    hello = client.hello
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: object = None
        if command == "offer":
            offer = client.offer("request", arguments[0], 16, arguments[1])
            answer = msgspec.to_builtins(
                PullSource(
                    hello.host, hello.port, hello.engine_id, offer.transfer_id, offer.token, offer.epoch,
                    len(arguments[0]),
                )
            )  # fmt: skip
        elif command == "pull":
            client.pull("pull", msgspec.convert(arguments[0], PullSource), arguments[1])
        elif command == "save":
            client.ask_store(
                StoreSave("save", [bytes.fromhex(block_hash) for block_hash in arguments[0]], arguments[1])
            )
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

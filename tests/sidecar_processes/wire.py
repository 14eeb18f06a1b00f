"""A network link in user space, between two TUN devices: it delays, loses, or swallows what one side sends.

    python -m tests.sidecar_processes.wire tun-a tun-b

What netem would do where the kernel has it. The devices are moved into namespaces by the caller and stay connected to
this process. One line of JSON on standard input sets the link: {"delay_s": 0.2, "loss": 0.01, "a_to_b": true,
"b_to_a": true}, what is not named is as in a good link; each is answered by "ok".
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES = 65536
GOOD = {"delay_s": 0.0, "loss": 0.0, "a_to_b": True, "b_to_a": True}


def tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


class Wire:
    def __init__(self, a: int, b: int) -> None:
        self.link = dict(GOOD)
        self._ends = {a: (b, "a_to_b"), b: (a, "b_to_a")}
        self._dice = random.Random(1)
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._number = 0

    def run(self) -> None:
        while True:
            wait_s = max(0.0, self._queue[0][0] - time.monotonic()) if self._queue else None
            readable, _, _ = select.select([sys.stdin, *self._ends], [], [], wait_s)
            for source in readable:
                if source is sys.stdin:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self.link = GOOD | json.loads(line)
                    print("ok", flush=True)
                else:
                    self._take(source)
            while self._queue and self._queue[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(self._queue)
                self._pass(to, packet)

    def _take(self, source: int) -> None:
        to, direction = self._ends[source]
        try:
            packet = os.read(source, PACKET_BYTES)
        except OSError:  # the device is down
            return
        if not self.link[direction] or self._dice.random() < self.link["loss"]:
            return
        if not self.link["delay_s"]:
            self._pass(to, packet)
            return
        self._number += 1
        heapq.heappush(self._queue, (time.monotonic() + self.link["delay_s"], self._number, to, packet))

    @staticmethod
    def _pass(to: int, packet: bytes) -> None:
        try:
            os.write(to, packet)
        except OSError:  # it is down, or full: a network may lose packets
            return


if __name__ == "__main__":
    wire = Wire(*map(tun, sys.argv[1:]))
    print("ready", flush=True)
    wire.run()

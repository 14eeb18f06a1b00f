"""How an engine's client and its sidecar begin: the hellos."""

from __future__ import annotations

import os
import socket

from sidecar import protocol
from sidecar.errors import FrameError, SidecarUnavailable, VersionMismatch
from sidecar.framing import FrameDecoder, encode_frame
from sidecar.protocol import (
    ENGINE_FRAME_BYTES,
    PROTOCOL_VERSION,
    EngineHello,
    Refused,
    SidecarHello,
    decode,
    encode,
)  # fmt: skip

READ_BYTES = 64 * 1024


def greet(socket_path: str, timeout_s: float) -> tuple[socket.socket, SidecarHello, FrameDecoder]:
    """Connect and exchange hellos. Raises SidecarUnavailable, or its child VersionMismatch."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout_s)
    decoder = FrameDecoder(ENGINE_FRAME_BYTES)
    try:
        sock.connect(socket_path)
        sock.sendall(encode_frame(encode(EngineHello(PROTOCOL_VERSION, f"pid {os.getpid()}"))))
        frames: list[bytes] = []
        while not frames:
            chunk = sock.recv(READ_BYTES)
            if not chunk:
                raise SidecarUnavailable(f"the sidecar at {socket_path} closed the connection at once")
            frames = decoder.feed(chunk)
        hello = decode(protocol.to_engine, frames[0])
        if isinstance(hello, Refused):
            raise VersionMismatch(f"the sidecar at {socket_path} refused: {hello.message}")
        if not isinstance(hello, SidecarHello) or hello.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatch(f"what answers at {socket_path} is not a sidecar of version {PROTOCOL_VERSION}")
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError | FrameError):
            reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            raise SidecarUnavailable(f"no sidecar at {socket_path}: {reason}") from error
        raise
    sock.settimeout(None)
    return sock, hello, decoder

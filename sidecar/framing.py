"""Length-prefixed frames: four bytes, big-endian, then that many bytes. Pure: feed it bytes, take frames out."""

from __future__ import annotations

from sidecar.errors import FrameError

HEADER_BYTES = 4


def encode_frame(payload: bytes) -> bytes:
    """`payload` with its length in front."""
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


class FrameDecoder:
    """Cuts a byte stream into frames, however it was split on the way."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    def feed(self, chunk: bytes) -> list[bytes]:
        """Every frame that `chunk` completes, in order. Raises FrameError as soon as a header is over the limit."""
        buffer = self._buffer
        buffer += chunk
        frames = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            length = int.from_bytes(buffer[start : start + HEADER_BYTES], "big")
            if length > self._max_frame_bytes:
                raise FrameError(f"a frame of {length} bytes is over the limit of {self._max_frame_bytes}")
            end = start + HEADER_BYTES + length
            if len(buffer) < end:
                break
            frames.append(bytes(buffer[start + HEADER_BYTES : end]))
            start = end
        if start:
            del buffer[:start]
        return frames

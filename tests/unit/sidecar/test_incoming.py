"""Descriptors beside frames: whose they are however the stream is cut, and what is done without them."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sidecar.errors import FrameError
from sidecar.framing import FrameDecoder, encode_frame
from sidecar.incoming import Incoming


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def incoming(sockets: tuple[socket.socket, socket.socket]) -> Iterator[Incoming]:
    made = Incoming(sockets[0], FrameDecoder(1000))
    yield made
    made.close()


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """This process can open so many more, and no others than the next."""
    free = [os.open("/dev/null", os.O_RDONLY) for _ in range(number + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    for fd in free:
        os.close(fd)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def named(fds: tuple[int, ...]) -> list[str]:
    """What they are; closes them."""
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
    for fd in fds:
        os.close(fd)
    return names


def memory(name: str) -> int:
    return os.memfd_create(name, os.MFD_CLOEXEC)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_frame_has_its_own_descriptors_wherever_it_is_cut(
    sockets: tuple[socket.socket, socket.socket], incoming: Incoming, cut: int
) -> None:
    found = []
    for name in ("first", "second"):
        fds = [memory(f"{name}-{which}") for which in ("pool", "board")]
        frame = encode_frame(name.encode())
        socket.send_fds(sockets[1], [encode_frame(b"other") + frame[:cut]], fds)
        assert incoming.frames() == [b"other"]
        sockets[1].sendall(frame[cut:])
        for fd in fds:
            os.close(fd)
        assert incoming.frames() == [name.encode()]
        found += named(incoming.take_fds(2))
    assert found == [
        f"/memfd:{name} (deleted)" for name in ("first-pool", "first-board", "second-pool", "second-board")
    ]
    with pytest.raises(FrameError, match="descriptors were expected"):
        incoming.take_fds(2)


@pytest.mark.parametrize("left", [0, 1])
def test_without_descriptors_left_frames_go_on_and_none_is_mistaken_for_another(
    sockets: tuple[socket.socket, socket.socket], incoming: Incoming, left: int
) -> None:
    fds = [memory("pool"), memory("board")]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        socket.send_fds(sockets[1], [encode_frame(b"opened")], fds)
    with descriptors_left(left):
        assert incoming.frames() == [b"opened"]
        assert incoming.take_fds(2) == ()
    assert incoming.frames() == [b"opened"]
    assert incoming.take_fds(2) == ()
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)

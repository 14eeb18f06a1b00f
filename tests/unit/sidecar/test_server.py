from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from sidecar.errors import StartError
from sidecar.server import EngineSocket, Listener, listen_abstract, listen_tcp


def test_the_engine_socket_is_for_its_user_alone_and_leaves_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "s"
    engine_socket = EngineSocket(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StartError, match="another sidecar is listening"):
        EngineSocket(str(path))
    engine_socket.remove()
    engine_socket.sock.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_the_successor_s_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = EngineSocket(str(path))
    dead.sock.close()
    robbed = EngineSocket(str(path))
    path.unlink()  # somebody tidied up
    successor = EngineSocket(str(path))
    robbed.remove()
    assert path.exists()
    successor.remove()
    assert not path.exists()
    robbed.sock.close()
    successor.sock.close()


@pytest.mark.parametrize("name", ["missing/s", "x" * 108, "file"])
def test_paths_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StartError, match="--socket"):
        EngineSocket(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "precious"


def test_ports() -> None:
    first = listen_tcp("127.0.0.1", 0, "--listen")
    port = first.getsockname()[1]
    with pytest.raises(StartError, match=rf"--listen 127\.0\.0\.1:{port}: .*take another port, or 0 for any"):
        listen_tcp("127.0.0.1", port, "--listen")
    first.close()
    with pytest.raises(StartError, match="give an address of this machine"):
        listen_tcp("203.0.113.1", 0, "--listen")
    with pytest.raises(StartError, match="give an address of this machine"):
        listen_tcp("no.such.host.invalid", 0, "--listen")


async def test_a_listener_hands_connections_over_until_it_is_closed() -> None:
    accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
    sock = listen_abstract(f"pd-sidecar-test-{os.getpid()}")
    name = sock.getsockname()
    listener = Listener(sock, accepted.put_nowait)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(name)
        connection = await asyncio.wait_for(accepted.get(), 5)
        assert not connection.getblocking()
        connection.close()
    listener.close()
    listener.close()
    with socket.socket(socket.AF_UNIX) as caller, pytest.raises(ConnectionRefusedError):
        caller.connect(name)

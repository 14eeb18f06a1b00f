"""The life of the process: the command itself, its signals, and what stops it from starting."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator

import pytest

from proxy.drain import wait_until
from proxy.errors import StartError
from proxy.listening import listening_sockets
from tests.unit.proxy.client import COMPLETIONS, Client, fields_of, request_bytes
from tests.unit.proxy.stand_in import Engine


@pytest.fixture
async def engines() -> AsyncIterator[tuple[Engine, Engine]]:
    pair = (Engine("prefill"), Engine("decode"))
    for engine in pair:
        await engine.start()
    yield pair
    for engine in pair:
        await engine.stop()


async def launch(engines: tuple[Engine, Engine], *flags: str) -> tuple[asyncio.subprocess.Process, int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy.cli", "--host", "127.0.0.1", "--port", "0",
        "--prefiller-hosts", "127.0.0.1", "--prefiller-ports", str(engines[0].port),
        "--decoder-hosts", "127.0.0.1", "--decoder-ports", str(engines[1].port), *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    ready = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
    assert ready.startswith("ready listen=127.0.0.1:")
    return process, int(ready.rsplit(":", 1)[1])


async def test_sigterm_lets_a_stream_end(engines: tuple[Engine, Engine]) -> None:
    process, port = await launch(engines)
    engines[1].gate = asyncio.Event()
    idle = await Client.connect(port)
    client = await Client.connect(port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True), X_Request_Id="last"))
    assert await wait_until(lambda: bool(engines[1].requests), 5)
    process.send_signal(signal.SIGTERM)
    assert await idle.closed_by_peer()
    with pytest.raises(ConnectionError):
        await Client.connect(port)
    engines[1].gate.set()
    answer = await client.answer()
    assert (answer.complete, answer.text) == (True, "t0 t1 t2 t3 ")
    assert await client.closed_by_peer()
    out, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 0 and out == b""
    log = err.decode()
    assert "Traceback" not in log and "event=stopped drained=True" in log
    assert "request_id=last" in log and "status=200 outcome=ok" in log and "hello" not in log
    idle.close()
    client.close()


async def test_the_drain_has_a_deadline(engines: tuple[Engine, Engine]) -> None:
    process, port = await launch(engines, "--drain-timeout-s", "0.2")
    engines[0].gate = asyncio.Event()
    client = await Client.connect(port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS)))
    assert await wait_until(lambda: bool(engines[0].requests), 5)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 0 and b"drained=False" in err and b"Traceback" not in err
    client.close()


async def test_an_occupied_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy.cli", "--host", "127.0.0.1", "--port", port,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == (
        f"pd-proxy: port {port} on 127.0.0.1 is in use; stop what listens there or choose another with --port\n"
    )


def test_localhost_is_all_its_addresses_on_one_port() -> None:
    sockets = listening_sockets("localhost", 0, 16)
    try:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert any(one.getsockname()[0] == "127.0.0.1" for one in sockets)
    finally:
        for one in sockets:
            one.close()


def test_a_host_that_is_not_ours_is_said() -> None:
    with pytest.raises(StartError, match="--host"):
        listening_sockets("192.0.2.1", 0, 16)
    with pytest.raises(StartError, match="--host no-such-host"):
        listening_sockets("no-such-host.invalid", 0, 16)

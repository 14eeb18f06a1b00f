"""The client's side over real sockets: framing, pipelining, limits, refusals, hand-over."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.unit.proxy.client import CHAT, COMPLETIONS, Client, ask, fields_of, request_bytes
from tests.unit.proxy.conftest import Start

TEXT = "t0 t1 t2 t3 "


async def test_a_request_arrives_in_any_pieces(start: Start) -> None:
    setup = await start()
    raw = request_bytes(COMPLETIONS, fields_of(COMPLETIONS))
    client = await Client.connect(setup.port)
    for cut in range(1, len(raw), 7):
        client.writer.write(raw[:cut])
        await asyncio.sleep(0.001)
        client.writer.write(raw[cut:])
        assert (await client.answer()).text == TEXT, cut
    client.close()


async def test_a_request_byte_by_byte(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    for byte in request_bytes(COMPLETIONS, fields_of(COMPLETIONS)):
        client.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await client.answer()).text == TEXT
    client.close()


async def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    client.writer.write(
        b"".join(
            request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=i % 2 == 1), X_Request_Id=f"r{i}")
            for i in range(6)
        )
        + b"GET /healthcheck HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    for i in range(6):
        answer = await client.answer()
        assert (answer.headers["x-request-id"], answer.text) == (f"r{i}", TEXT)
    assert (await client.answer()).body.startswith(b'{"status":"ok"')
    assert await client.closed_by_peer()
    client.close()
    assert [one.headers["x-request-id"] for one in setup.p.requests] == [f"r{i}" for i in range(6)]


async def test_a_chunked_upload(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    body = request_bytes(CHAT, fields_of(CHAT)).partition(b"\r\n\r\n")[2]
    pieces = b"".join(b"%x\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body)))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for _ in range(2):
        client.writer.write(head + pieces + b"0\r\n\r\n")
        assert (await client.answer()).text == TEXT
    client.close()
    assert setup.d.requests[0].headers["content-length"] == str(len(setup.d.requests[0].body))


async def test_a_client_that_asks_first(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    raw = request_bytes(COMPLETIONS, fields_of(COMPLETIONS), Expect="100-continue")
    head, _, body = raw.partition(b"\r\n\r\n")
    client.writer.write(head + b"\r\n\r\n")
    assert (await client.head())[0] == 100
    client.writer.write(body)
    assert (await client.answer()).text == TEXT
    client.close()


async def test_connection_close_is_kept(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    answer = await client.post(COMPLETIONS, fields_of(COMPLETIONS), Connection="close")
    assert (answer.text, answer.headers["connection"]) == (TEXT, "close")
    assert await client.closed_by_peer()
    client.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_at_the_limit_and_past_it(start: Start, chunked: bool) -> None:
    setup = await start(max_body_bytes=1000)
    empty = len(b'{"prompt":"","x":""}')
    for size, status in ((1000, 200), (1001, 413)):
        body = b'{"prompt":"","x":"%b"}' % (b"a" * (size - empty))
        assert len(body) == size
        client = await Client.connect(setup.port)
        if chunked:
            framed = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
            client.writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + framed
            )
        else:
            client.writer.write(request_bytes(COMPLETIONS, body))
        answer = await client.answer()
        assert answer.status == status
        if status == 413:
            assert "1000 bytes" in answer.error["message"] and answer.headers["connection"] == "close"
            assert await client.closed_by_peer()
        client.close()


async def test_a_head_past_the_limit(start: Start) -> None:
    setup = await start(max_head_bytes=2000)
    client = await Client.connect(setup.port)
    client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 3000)
    assert (await client.answer()).status == 431
    assert await client.closed_by_peer()
    client.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_not_a_request_is_400_and_closed(
    start: Start, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    client.writer.write(raw)
    answer = await client.answer()
    assert answer.status in (400, 505) and answer.error["message"] and answer.headers["connection"] == "close"
    assert await client.closed_by_peer()
    client.close()
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


async def test_a_bad_body_is_400_and_the_connection_stays(start: Start) -> None:
    setup = await start()
    client = await Client.connect(setup.port)
    answer = await client.post(COMPLETIONS, b"{nonsense", X_Request_Id="bad")
    assert (answer.status, answer.headers["x-request-id"]) == (400, "bad")
    assert "not valid JSON" in answer.error["message"]
    assert (await client.post(COMPLETIONS, fields_of(COMPLETIONS))).text == TEXT
    client.close()


async def test_a_compressed_body_is_refused(start: Start) -> None:
    setup = await start()
    answer = await ask(setup.port, COMPLETIONS, b"\x1f\x8b", Content_Encoding="gzip")
    assert answer.status == 415


async def test_other_routes_are_served_and_closed(start: Start) -> None:
    setup = await start()
    for request, status, says in (
        (b"GET /v1/completions", 405, b"GET is not allowed"),
        (b"GET /nowhere", 404, b"There is no /nowhere here."),
        (b"DELETE /health", 405, b"not allowed"),
        (b"GET /version", 200, b"version"),
    ):
        client = await Client.connect(setup.port)
        client.writer.write(request + b" HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
        answer = await client.answer()
        assert answer.status == status and says in answer.body
        assert answer.headers["connection"] == "close"
        assert await client.closed_by_peer()
        client.close()


async def test_a_slow_reader_slows_the_decoder(start: Start) -> None:
    """What the proxy holds for a client that does not read is bounded."""
    setup = await start()
    sent = 0
    blocked = asyncio.Event()

    async def flood(engine, writer, request) -> None:  # type: ignore[no-untyped-def]
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        payload = b"data: " + b"x" * 65528 + b"\n\n"
        for _ in range(400):
            writer.write(b"%x\r\n%b\r\n" % (len(payload), payload))
            sent += len(payload)
            try:
                await asyncio.wait_for(writer.drain(), 0.5)
            except TimeoutError:
                blocked.set()
                await writer.drain()
        writer.write(b"0\r\n\r\n")

    setup.d.script = [flood]
    client = await Client.connect(setup.port)
    client.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True)))
    assert (await client.head())[0] == 200
    await asyncio.wait_for(blocked.wait(), 10)
    assert sent < 400 * 65536
    assert sum(one.transport.get_write_buffer_size() for one in setup.app.connections) < 2_000_000
    size = 0
    while data := await client.reader.read(1 << 20):
        size += len(data)
        if data.endswith(b"0\r\n\r\n"):
            break
    assert size > 400 * 65536
    client.close()


async def test_idle_and_half_sent_requests_are_ended(start: Start) -> None:
    setup = await start(client_keepalive_s=0.2, request_read_timeout_s=0.2)
    idle = await Client.connect(setup.port)
    slow = await Client.connect(setup.port)
    slow.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    assert await idle.closed_by_peer()
    assert (await slow.answer()).status == 408
    idle.close()
    slow.close()

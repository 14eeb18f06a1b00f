"""The data connection against ends that break it; two sidecars use it for real in tests/sidecar_processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from sidecar.config import SidecarConfig
from sidecar.errors import Refusal
from sidecar.layout import KvLayout, Plane
from sidecar.lease_board import LeaseBoard
from sidecar.protocol import RegionOpened
from sidecar.regions import Region
from sidecar.registration import Registration
from sidecar.spans import Spans
from sidecar.transport import tcp, tcp_serving, tcp_spans
from sidecar.transport.contract import COPIED, STOPPED, VOID
from sidecar.transport.tcp import TcpMemory, TcpTransport
from sidecar.transport.tcp_wire import (
    GRANTED,
    HELD,
    LOST,
    MAGIC,
    MAX_VIEWS,
    NOT_LEASED,
    PAGE_BYTES,
    REQUEST,
    SECRET_BYTES,
    DataFault,
    Pace,
    Stop,
    answer,
    ending,
    pieces,
    receive,
    receive_answer,
    receive_ending,
    refusal,
    send,
    spare_pacing,
)  # fmt: skip

POOL_BYTES = 4 << 20
MARK = 77
TIMEOUT_S = 20


def registration(epoch: str, content: bytes = b"") -> Registration:
    fd = os.memfd_create("pool")
    os.ftruncate(fd, POOL_BYTES)
    os.pwrite(fd, content, 0)
    layout = KvLayout(POOL_BYTES // 4096, 16, (Plane(0, 4096, 4096),), 1, 1, 1, "float32", "m", "o")
    return Registration(epoch, layout, fd, Region(fd, POOL_BYTES, writable=True), -1)


@dataclass
class Ends:
    """A producer's transport that serves, and a consumer's registration."""

    transport: TcpTransport
    producer: Registration
    consumer: Registration
    session: str
    content: bytes
    board: LeaseBoard

    def opened(self, session: str = "") -> RegionOpened:
        return RegionOpened(1, POOL_BYTES, session=session or self.session)

    async def open(self, session: str = "") -> TcpMemory:
        return await self.transport.open(self.consumer, self.opened(session), None)

    def read(self) -> bytes:
        return os.pread(self.consumer.fd, POOL_BYTES, 0)


@pytest.fixture(params=["in C", "in Python"])
async def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ends]:
    if request.param == "in Python":
        monkeypatch.setattr(tcp_spans, "_library", None)
    elif tcp_spans._library is None:
        pytest.skip("no C compiler was there at installation")
    content = random.Random(5).randbytes(POOL_BYTES)
    producer, consumer = registration("p", content), registration("c")
    board = LeaseBoard()
    transport = TcpTransport(SidecarConfig(socket="/tmp/s", engine_id="e"), "127.0.0.1", board)
    yield Ends(transport, producer, consumer, (await transport.serve(producer)).session, content, board)
    await transport.retire(producer)
    board.close()
    for pool in (producer, consumer):
        pool.close()


@contextlib.contextmanager
def scripted(*answers: bytes, then_wait: bool = False) -> Iterator[str]:
    """A producer that takes any hello and any request and answers as told; yields its session."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def play() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(len(MAGIC) + SECRET_BYTES, socket.MSG_WAITALL)
                    connection.sendall(answer(GRANTED, 0))
                    for said in answers:
                        connection.recv(65536)
                        connection.sendall(said)
                    if then_wait:
                        over.wait(TIMEOUT_S)

        thread = threading.Thread(target=play)
        thread.start()
        yield f"127.0.0.1 {listener.getsockname()[1]} {'0' * SECRET_BYTES}"
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT_S)


def first_byte_written(ends: Ends) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not any(os.pread(ends.consumer.fd, 1, 0)):
        assert time.monotonic() < end
        time.sleep(0.001)


async def outcome(memory: TcpMemory, spans: Spans, mark: int = 0) -> str:
    return await asyncio.wait_for(memory.read(spans, mark).ended, TIMEOUT_S)


async def test_spans_of_all_sizes_arrive_where_they_belong(ends: Ends) -> None:
    dice = random.Random(9)
    memory = await ends.open()
    lengths = [dice.choice([1, 100, 4096, 70_000, 1_500_000]) for _ in range(40)]
    local, at = [], 0
    for length in lengths:
        local.append(at)
        at += length + 1
        if at > POOL_BYTES:
            break
    local = local[:-1]
    lengths = lengths[: len(local)]
    remote = [dice.randrange(POOL_BYTES - length) for length in lengths]
    expected = bytearray(POOL_BYTES)
    for start, to, length in zip(remote, local, lengths, strict=True):
        expected[to : to + length] = ends.content[start : start + length]
    assert await outcome(memory, Spans(remote, local, lengths)) == COPIED
    assert ends.read() == expected
    await memory.close()


async def test_many_small_spans_and_several_copies_at_once(ends: Ends) -> None:
    memory = await ends.open()
    order = random.Random(1).sample(range(POOL_BYTES // 512), POOL_BYTES // 512)
    parts = [order[n::12] for n in range(12)]
    spans = [Spans([b * 512 for b in part], [b * 512 for b in part], [512] * len(part)) for part in parts]
    assert await asyncio.gather(*(outcome(memory, part) for part in spans)) == [COPIED] * 12
    assert ends.read() == ends.content
    await memory.close()


async def test_a_wrong_token_is_refused(ends: Ends) -> None:
    host, port, secret = ends.session.split()
    with pytest.raises(Refusal, match="token is wrong"):
        await ends.open(f"{host} {port} {'0' * len(secret)}")


@pytest.mark.parametrize(
    "session", ["", "x", "127.0.0.1 1 s", "127.0.0.1 99999 s", "127.0.0.1 x s", "nowhere.invalid 1 s"]
)
async def test_an_address_that_leads_nowhere_is_refused(ends: Ends, session: str) -> None:
    with pytest.raises(Refusal) as refused:
        await ends.open(session or "a b c d")
    assert refused.value.reason == "transport"


@pytest.mark.parametrize("span", [(POOL_BYTES - 1, 2), (POOL_BYTES, 1), (1 << 63, 1), (0, 0), (0, (1 << 64) - 1)])
async def test_a_span_out_of_bounds_is_refused_by_the_producer(ends: Ends, span: tuple[int, int]) -> None:
    memory = await ends.open()
    answer = await outcome(memory, Spans([0, span[0]], [0, 4096], [10, span[1]]))
    assert "leaves a registered region" in answer and memory.broken == answer
    assert not any(ends.read())
    with pytest.raises(Refusal):
        memory.read(Spans([0], [0], [1]))
    await memory.close()


async def test_a_transfer_of_more_spans_than_a_request_holds_sends_several(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "MAX_SPANS", 7)
    monkeypatch.setattr(tcp_serving, "MAX_SPANS", 7)
    memory = await ends.open()
    starts = list(range(0, 20 * 50, 50))
    assert await outcome(memory, Spans(starts[::-1], starts, [50] * 20)) == COPIED
    want = b"".join(ends.content[start : start + 50] for start in starts[::-1])
    assert ends.read()[: len(want)] == want
    await memory.close()


async def test_too_many_spans_in_a_request_are_refused(ends: Ends) -> None:
    host, port, secret = ends.session.split()

    def ask() -> None:
        with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
            sock.setblocking(True)
            send(sock, [memoryview(MAGIC + secret.encode())])
            receive_answer(sock)
            send(sock, [memoryview(REQUEST.pack(0xFFFFFFFF, 0))])
            with pytest.raises(DataFault, match=f"refused: {0xFFFFFFFF} spans were asked for"):
                receive_answer(sock)

    await asyncio.to_thread(ask)


@pytest.mark.parametrize("lengths", [[1], [PAGE_BYTES], [PAGE_BYTES - 1, 2], [5000, 70_000]], ids=str)
async def test_whatever_is_asked_for_the_producer_sends_whole_pages(ends: Ends, lengths: list[int]) -> None:
    host, port, secret = ends.session.split()

    def ask() -> int:
        with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
            sock.setblocking(True)
            spans = b"".join(struct.pack("<QQ", 7, length) for length in lengths)
            send(sock, [memoryview(MAGIC + secret.encode() + REQUEST.pack(len(lengths), 0) + spans)])
            sock.shutdown(socket.SHUT_WR)
            return sum(len(chunk) for chunk in iter(lambda: sock.recv(1 << 16), b""))

    assert await asyncio.to_thread(ask) == 3 * PAGE_BYTES + -(-sum(lengths) // PAGE_BYTES) * PAGE_BYTES


def test_only_to_a_peer_on_this_host_pacing_is_spared() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for source in ("127.0.0.1", "127.0.0.2"):
            with socket.create_connection(listener.getsockname(), TIMEOUT_S, (source, 0)):
                theirs, _ = listener.accept()
                with theirs:
                    before = theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                    spare_pacing(theirs)
                    after = theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                    assert after == before or (source == "127.0.0.1" and after.startswith(b"reno"))
    with socket.socket() as unconnected:
        spare_pacing(unconnected)


def test_a_refusal_of_any_length_is_an_answer() -> None:
    for text in ("", "x", "no " * 5000):
        page = refusal(text)
        assert len(page) == PAGE_BYTES == len(answer(GRANTED, 1 << 63))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(page)
            with pytest.raises(DataFault, match="the producer refused: " + text[:1000]):
                receive_answer(ours)


async def test_a_read_by_a_mark_that_stands_is_a_good_one(ends: Ends) -> None:
    memory = await ends.open()
    assert memory.checks_marks and ends.board.post(MARK, 60.0)
    assert await outcome(memory, Spans([0], [0], [POOL_BYTES]), MARK) == COPIED
    assert ends.read() == ends.content
    await memory.close()


async def test_by_a_mark_that_does_not_stand_nothing_is_read_and_the_connection_goes_on(ends: Ends) -> None:
    memory = await ends.open()
    assert ends.board.post(MARK, -1.0)  # expired
    for mark in (MARK, MARK + 1):
        assert await outcome(memory, Spans([0], [0], [POOL_BYTES]), mark) == VOID
    assert not any(ends.read()) and not memory.broken
    assert await outcome(memory, Spans([5], [6], [7])) == COPIED
    await memory.close()


@pytest.mark.parametrize("how", ["taken off", "closed"])
async def test_a_mark_that_goes_while_its_blocks_are_read_voids_the_read(ends: Ends, how: str) -> None:
    """The reader takes the answer, the mark goes, and only then what the kernel could not hold is read."""
    host, port, secret = ends.session.split()
    num_spans = 64
    assert ends.board.post(MARK, 60.0)

    def ask(sock: socket.socket) -> None:
        sock.setblocking(True)
        spans = struct.pack("<QQ", 0, POOL_BYTES) * num_spans
        send(sock, [memoryview(MAGIC + secret.encode() + REQUEST.pack(num_spans, MARK) + spans)])
        assert receive_answer(sock) == (GRANTED, 1)
        assert receive_answer(sock) == (GRANTED, num_spans * POOL_BYTES)

    def drain(sock: socket.socket) -> bytes:
        for _ in range(num_spans):
            assert receive(sock, POOL_BYTES) == ends.content
        return receive_ending(sock, num_spans * POOL_BYTES)

    with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
        await asyncio.to_thread(ask, sock)
        if how == "taken off":
            ends.board.take_off(MARK)
        else:
            ends.board.close()
        assert await asyncio.to_thread(drain, sock) == LOST


@pytest.mark.parametrize(("last", "expected"), [(HELD, COPIED), (LOST, VOID), (b"\7", VOID)])
async def test_only_what_was_held_to_the_end_counts(ends: Ends, last: bytes, expected: str) -> None:
    with scripted(answer(GRANTED, 5000) + b"x" * 5000 + ending(5000, last)) as session:
        memory = await ends.open(session)
        assert not memory.checks_marks
        assert await outcome(memory, Spans([0], [0], [5000]), MARK) == expected
        await memory.close()


async def test_what_was_not_read_by_a_mark_cannot_be_void(ends: Ends) -> None:
    with scripted(answer(NOT_LEASED, 0), then_wait=True) as session:
        memory = await ends.open(session)
        assert await outcome(memory, Spans([0], [0], [5000])) not in (COPIED, VOID)
        assert memory.broken
        await memory.close()


async def test_a_producer_without_a_board_says_so(ends: Ends) -> None:
    transport = TcpTransport(SidecarConfig(socket="/tmp/s", engine_id="e"), "127.0.0.1")
    memory = await ends.open((await transport.serve(ends.producer)).session)
    assert not memory.checks_marks
    await memory.close()
    await transport.retire(ends.producer)


@pytest.mark.parametrize("num_spans", [1, tcp.MAX_EARLY_SPANS, tcp.MAX_EARLY_SPANS + 1])
async def test_a_request_sent_at_once_and_one_left_to_the_thread(ends: Ends, num_spans: int) -> None:
    memory = await ends.open()
    starts = list(range(0, num_spans * 512, 512))
    assert await outcome(memory, Spans(starts[::-1], starts, [512] * num_spans)) == COPIED
    assert ends.read() == b"".join(ends.content[at : at + 512] for at in starts[::-1]).ljust(POOL_BYTES, b"\0")
    await memory.close()


async def test_a_request_that_the_kernel_does_not_take_at_once_is_sent_by_the_thread(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "MAX_EARLY_SPANS", tcp.MAX_SPANS)
    memory = await ends.open()
    memory._idle_sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    num_spans = POOL_BYTES // 16
    starts = list(range(0, POOL_BYTES, 16))
    assert await outcome(memory, Spans(starts, starts, [16] * num_spans)) == COPIED
    assert ends.read() == ends.content
    await memory.close()


async def test_a_copy_stopped_before_its_thread_is_awake_writes_nothing_more(ends: Ends) -> None:
    memory = await ends.open()
    copy = memory.read(Spans([0], [0], [POOL_BYTES]))
    copy.stop()
    assert await asyncio.wait_for(copy.ended, TIMEOUT_S) == STOPPED
    os.pwrite(ends.consumer.fd, bytes(POOL_BYTES), 0)
    assert await outcome(memory, Spans([0], [0], [3])) == COPIED
    assert ends.read() == ends.content[:3].ljust(POOL_BYTES, b"\0")
    await memory.close()


@pytest.mark.parametrize("bytes_per_s", [0, 40 << 20])
async def test_a_cap_is_kept(ends: Ends, bytes_per_s: int) -> None:
    config = SidecarConfig(socket="/tmp/s", engine_id="e", copy_bytes_per_s=bytes_per_s)
    memory = await TcpTransport(config, "127.0.0.1").open(ends.consumer, ends.opened(), None)
    started = time.monotonic()
    assert await outcome(memory, Spans([0], [0], [POOL_BYTES])) == COPIED
    if bytes_per_s:
        assert time.monotonic() - started > 0.7 * POOL_BYTES / bytes_per_s
    assert ends.read() == ends.content
    await memory.close()


@pytest.mark.parametrize("sent", [0, 1, 5000])
async def test_a_truncated_stream_is_a_failure(ends: Ends, sent: int) -> None:
    with scripted(answer(GRANTED, 10_000) + b"x" * sent) as session:
        memory = await ends.open(session)
        assert await outcome(memory, Spans([0], [0], [10_000])) != COPIED
        assert memory.broken
        assert not any(ends.read()[sent:])
        await memory.close()


async def test_an_answer_of_another_length_is_a_failure_before_a_byte_is_taken(ends: Ends) -> None:
    with scripted(answer(GRANTED, 9_999) + b"x" * 9_999) as session:
        memory = await ends.open(session)
        assert "instead of 10000" in await outcome(memory, Spans([0], [0], [10_000]))
        assert not any(ends.read())
        await memory.close()


async def test_a_stop_in_the_middle_ends_the_copy_and_not_a_byte_follows(ends: Ends) -> None:
    with scripted(answer(GRANTED, 10_000) + b"x" * 5000, then_wait=True) as session:
        memory = await ends.open(session)
        copy = memory.read(Spans([0], [0], [10_000]))
        await asyncio.to_thread(first_byte_written, ends)
        copy.stop()
        assert await asyncio.wait_for(copy.ended, TIMEOUT_S) == STOPPED
        os.pwrite(ends.consumer.fd, bytes(10_000), 0)
        await memory.close()
        assert not any(ends.read())


async def test_closing_ends_what_runs_and_what_waits(ends: Ends) -> None:
    with scripted(answer(GRANTED, 10_000), then_wait=True) as session:
        memory = await ends.open(session)
        copies = [memory.read(Spans([0], [0], [10_000])) for _ in range(20)]
        await asyncio.wait_for(memory.close(), TIMEOUT_S)
        assert all(copy.ended.done() and copy.ended.result() != COPIED for copy in copies)


async def test_a_reader_that_does_not_read_is_cut_off_when_the_pool_goes(ends: Ends) -> None:
    host, port, secret = ends.session.split()
    with socket.create_connection((host, int(port)), TIMEOUT_S) as sock:
        request = REQUEST.pack(64, 0) + struct.pack("<QQ", 0, POOL_BYTES) * 64
        await asyncio.to_thread(sock.sendall, MAGIC + secret.encode() + request)
        await asyncio.to_thread(sock.recv, 2 * PAGE_BYTES, socket.MSG_WAITALL)
        await asyncio.wait_for(ends.transport.retire(ends.producer), TIMEOUT_S)
    ends.session = (await ends.transport.serve(ends.producer)).session
    memory = await ends.open()
    assert await outcome(memory, Spans([1], [2], [3])) == COPIED
    await memory.close()


def test_pieces_cover_every_byte_in_order_within_the_limits() -> None:
    dice = random.Random(3)
    spans, at = [], 0
    for _ in range(2000):
        length = dice.choice([1, 100, 5000, 300_000])
        spans.append((at, length))
        at += length
    covered = 0
    for piece in pieces(spans, 100_000):
        assert 0 < len(piece) <= MAX_VIEWS and sum(length for _, length in piece) <= 100_000
        for offset, length in piece:
            assert offset == covered and length > 0
            covered += length
    assert covered == at


@pytest.mark.parametrize("split", range(1, 40, 3))
def test_what_comes_in_parts_fills_every_buffer(split: int) -> None:
    ours, theirs = socket.socketpair()
    message = bytes(range(40))
    with ours, theirs:
        theirs.sendall(message[:split])
        sender = threading.Timer(0.01, theirs.sendall, [message[split:]])
        sender.start()
        assert receive(ours, 40) == message
        sender.join()
        theirs.close()
        assert receive(ours, 4, may_end=True) == b""
        with pytest.raises(DataFault, match="ended"):
            receive(ours, 4)


def test_a_stopped_copy_does_not_wait_for_its_turn() -> None:
    pace, stopped = Pace(1000), Stop()
    assert pace.wait(1_000_000, stopped)
    stopped.set()
    assert not pace.wait(1, stopped)
    assert not Pace(0).wait(1, stopped)

"""Streams in the hands of the thread: what it passes on, what it gives back, and that no byte is lost, told twice or
told to somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import uvloop

from proxy.lending import Returned, Terms
from proxy.relay_library import MAX_ID_BYTES, MAX_TAIL_BYTES, library
from proxy.relay_thread import Loan, RelayThread

pytestmark = pytest.mark.skipif(library() is None, reason="built without a C compiler")

TAIL = b'"finish_reason":null}]}\n\n\r\n'
TIMEOUT_S = 20.0


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def token(text: bytes, name: bytes = b"cmpl-1") -> bytes:
    return chunk(b'data: {"id":"%b","choices":[{"text":"%b","finish_reason":null}]}\n\n' % (name, text))


LAST = chunk(b'data: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n')
TOKENS = [token(b"t%d" % i) for i in range(5)]


class Idle(asyncio.Protocol):
    """Of a source whose reads are the thread's."""


class Stream:
    """Two connections with the thread between them: `engine` writes, `reader` reads."""

    def __init__(self, thread: RelayThread) -> None:
        self.thread = thread
        self.engine, self.inner = socket.socketpair()
        self.outer, self.reader = socket.socketpair()
        for one in (self.engine, self.inner, self.outer, self.reader):
            one.setblocking(False)
        self.returned = asyncio.Event()
        self.settled: list[Returned] = []
        self.loan: Loan | None = None

    async def lend(
        self, first: bytes = b"", *, ids: tuple[bytes, bytes] = (b"", b""), room: int = 1 << 20, tail: bytes = TAIL
    ) -> Loan | None:
        self.source, _ = await asyncio.get_running_loop().create_connection(Idle, sock=self.inner)
        terms = Terms(tail, *ids, room)
        self.loan = self.thread.lend(
            self.source, self.outer.fileno(), terms, first, self.returned.set, self.settled.append
        )
        return self.loan

    async def came_back(self) -> Returned:
        await asyncio.wait_for(self.returned.wait(), TIMEOUT_S)
        assert self.loan is not None
        returned = self.loan.end()
        assert self.settled == [returned]
        return returned

    async def read(self, num_bytes: int) -> bytes:
        loop, got = asyncio.get_running_loop(), b""
        while len(got) < num_bytes:
            got += await asyncio.wait_for(loop.sock_recv(self.reader, 1 << 16), TIMEOUT_S)
        return got

    def read_now(self) -> bytes:
        got = b""
        with contextlib.suppress(BlockingIOError):
            while more := self.reader.recv(1 << 16):
                got += more
        return got

    def close(self) -> None:
        self.source.abort()
        for one in (self.engine, self.outer, self.reader):
            one.close()


@pytest.fixture
async def thread() -> AsyncIterator[RelayThread]:
    await one_of_each()
    before = num_descriptors(), num_threads()
    found = RelayThread.start(asyncio.get_running_loop())
    assert found is not None
    yield found
    found.stop()
    for _ in range(5):  # what is aborted is closed in the next rounds
        await asyncio.sleep(0)
    assert (num_descriptors(), num_threads()) == before


async def one_of_each() -> None:
    """The loop and its pool open some descriptors when they are first used."""
    await asyncio.to_thread(threading.Event().wait, 0)
    one, other = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().create_connection(Idle, sock=one)
    transport.abort()
    other.close()
    await asyncio.sleep(0)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
async def stream(thread: RelayThread) -> AsyncIterator[Stream]:
    made = Stream(thread)
    yield made
    made.close()
    await asyncio.sleep(0)


async def test_token_events_are_passed_on_and_anything_else_comes_back(stream: Stream) -> None:
    await stream.lend(b"HTTP/1.1 200 OK\r\n\r\n" + TOKENS[0])
    assert await stream.read(19 + len(TOKENS[0])) == b"HTTP/1.1 200 OK\r\n\r\n" + TOKENS[0]
    for one in TOKENS[1:]:
        stream.engine.send(one)
        assert await stream.read(len(one)) == one
    stream.engine.send(LAST + b"0\r\n\r\n")
    returned = await stream.came_back()
    assert returned.rest == LAST + b"0\r\n\r\n" and not returned.unsent
    assert returned.num_chunks == 4
    assert returned.kept is not None and returned.kept.copied() == b"".join(TOKENS[1:])
    assert returned.kept.num_bytes == len(b"".join(TOKENS[1:]))


async def test_several_tokens_in_one_read_go_on_up_to_the_first_that_is_none(stream: Stream) -> None:
    await stream.lend()
    stream.engine.send(b"".join(TOKENS) + LAST + TOKENS[0])
    returned = await stream.came_back()
    assert returned.rest == LAST + TOKENS[0] and returned.num_chunks == 5
    assert stream.read_now() == b"".join(TOKENS)


async def test_reads_that_are_cut_anywhere_lose_nothing(thread: RelayThread) -> None:
    said = b"".join(TOKENS) + LAST
    for cut in range(1, len(said)):
        stream = Stream(thread)
        await stream.lend()
        stream.engine.send(said[:cut])
        await asyncio.sleep(0.0005 if cut % 7 == 0 else 0)
        stream.engine.send(said[cut:])
        returned = await stream.came_back()
        assert stream.read_now() + returned.rest == said, cut
        assert LAST.startswith(returned.rest[: len(LAST)]) and returned.num_chunks == 5, cut
        stream.close()
        await asyncio.sleep(0)


TROUBLE = {
    "the last chunk": b"0\r\n\r\n",
    "an extension": b"a;x=1\r\n" + b"." * 10 + b"\r\n",
    "no size": b"\r\nabc",
    "a bad size": b"g\r\n",
    "a sign": b"+5\r\nhello\r\n",
    "blanks": b" 5\r\nhello\r\n",
    "a bare line feed": b"5\nhello\r\n",
    "no end of the chunk": b"5\r\nhelloXX",
    "a size of many digits": b"00000005\r\nhello\r\n",
    "a chunk that is too large": b"9000\r\n",
    "an event that is no token": chunk(b"data: [DONE]\n\n"),
    "a comment": chunk(b": keep-alive\n\n"),
    "half an event": chunk(b'data: {"choices":[{"text":"'),
    "an end that only looks so": chunk(TAIL[:-2] + b" "),
    "something shorter than a token's end": chunk(b"x"),
}


@pytest.mark.parametrize("name", TROUBLE)
async def test_what_is_no_token_is_left_as_it_came(stream: Stream, name: str) -> None:
    await stream.lend()
    stream.engine.send(TOKENS[0] + TROUBLE[name] + TOKENS[1])
    returned = await stream.came_back()
    assert stream.read_now() == TOKENS[0]
    assert returned.rest == TROUBLE[name] + TOKENS[1]


async def test_ids_are_replaced_in_what_is_sent_and_not_in_what_is_kept(stream: Stream) -> None:
    await stream.lend(ids=(b"cmpl-1", b"cmpl-X"))
    both = token(b"cmpl-1 twice") + token(b"b")
    stream.engine.send(both + LAST)
    returned = await stream.came_back()
    assert stream.read_now() == both.replace(b"cmpl-1", b"cmpl-X")
    assert returned.kept is not None and returned.kept.copied() == both


async def test_what_there_is_no_room_for_is_forgotten_and_still_passed_on(thread: RelayThread) -> None:
    many = [token(b"%05d" % i) for i in range(600)]
    whole = b"".join(many)
    for room, is_kept in ((len(whole), True), (len(whole) - 1, False), (0, False)):
        stream = Stream(thread)
        await stream.lend(room=room)
        for begin in range(0, 600, 50):
            stream.engine.send(b"".join(many[begin : begin + 50]))
            await stream.read(len(b"".join(many[begin : begin + 50])))
        stream.engine.send(LAST)
        returned = await stream.came_back()
        assert returned.num_chunks == 600
        assert (returned.kept is not None) is is_kept
        if returned.kept is not None:
            assert returned.kept.copied() == whole and returned.kept.num_bytes == len(whole)
        stream.close()
        await asyncio.sleep(0)


async def test_a_client_that_takes_no_more_comes_back_with_what_it_lacks(stream: Stream) -> None:
    await stream.lend()
    sent = b""
    for i in range(100_000):
        one = token(b"%05d" % i)
        try:
            stream.engine.send(one)
            sent += one
        except BlockingIOError:
            await asyncio.sleep(0.001)
        if stream.returned.is_set():
            break
    returned = await stream.came_back()
    stream.source.pause_reading()
    left = b""
    with contextlib.suppress(BlockingIOError), stream.inner.dup() as inner:
        while more := inner.recv(1 << 16):
            left += more
    assert returned.unsent
    assert stream.read_now() + returned.unsent + returned.rest + left == sent


async def test_a_client_that_takes_nothing_of_the_first(stream: Stream) -> None:
    stream.outer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            stream.outer.send(b"x" * 65536)
    await stream.lend(TOKENS[0])
    returned = await stream.came_back()
    assert (returned.unsent, returned.rest, returned.num_chunks) == (TOKENS[0], b"", 0)


@pytest.mark.parametrize("half", [False, True])
async def test_a_decoder_that_is_gone(stream: Stream, half: bool) -> None:
    await stream.lend()
    stream.engine.send(TOKENS[0] + TOKENS[1][:7])
    if half:
        stream.engine.shutdown(socket.SHUT_WR)
    else:
        stream.engine.close()
    returned = await stream.came_back()
    assert stream.read_now() == TOKENS[0] and returned.rest == TOKENS[1][:7]


async def test_a_client_that_is_gone_ends_nothing_else(stream: Stream) -> None:
    await stream.lend()
    stream.reader.close()
    stream.engine.send(TOKENS[0])
    returned = await stream.came_back()
    assert returned.unsent == TOKENS[0]


async def test_it_is_told_whether_anything_moves(stream: Stream) -> None:
    loan = await stream.lend()
    assert loan is not None and not loan.has_moved()
    stream.engine.send(TOKENS[0])
    await stream.read(len(TOKENS[0]))
    assert loan.has_moved() and not loan.has_moved()
    stream.engine.send(LAST)
    await stream.came_back()


async def test_one_that_came_back_and_was_taken_before_it_was_told_is_told_no_more(thread: RelayThread) -> None:
    streams = [Stream(thread) for _ in range(3)]
    for stream in streams:
        await stream.lend()
        stream.engine.send(LAST)
    await asyncio.to_thread(threading.Event().wait, 0.05)  # all are back, and nobody has been told
    assert streams[1].loan is not None
    assert streams[1].loan.end().rest == LAST
    for stream in (streams[0], streams[2]):
        assert (await stream.came_back()).rest == LAST
    assert not thread.num_lent
    for stream in streams:
        stream.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    "terms",
    [
        Terms(b"x" * (MAX_TAIL_BYTES + 1), b"", b"", 9),
        Terms(b"", b"", b"", 9),
        Terms(TAIL, b"x" * (MAX_ID_BYTES + 1), b"x" * (MAX_ID_BYTES + 1), 9),
        Terms(TAIL, b"ab", b"a", 9),
    ],
)
async def test_terms_that_it_cannot_keep_are_refused_and_nothing_is_sent(stream: Stream, terms: Terms) -> None:
    assert await stream.lend() is not None
    assert stream.loan is not None
    stream.loan.end()
    assert stream.thread.lend(stream.source, stream.outer.fileno(), terms, b"x", lambda: None, print) is None
    assert not stream.read_now() and stream.source.is_reading()


async def test_no_more_are_lent_than_there_may_be(thread: RelayThread) -> None:
    few = RelayThread.start(asyncio.get_running_loop(), 1)
    assert few is not None
    one, other = Stream(few), Stream(few)
    assert await one.lend() is not None and await other.lend(TOKENS[0]) is None
    assert not other.read_now() and other.source.is_reading()
    assert one.loan is not None
    one.loan.end()
    other.loan = few.lend(other.source, other.outer.fileno(), Terms(TAIL, b"", b"", 9), b"", lambda: None, print)
    assert other.loan is not None
    other.loan.end()
    for stream in (one, other):
        stream.close()
    few.stop()


async def test_without_a_descriptor_left_nothing_is_lent(stream: Stream) -> None:
    stream.source, _ = await asyncio.get_running_loop().create_connection(Idle, sock=stream.inner)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with stream.reader.dup() as next_one:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one.fileno(), hard))
    try:
        terms = Terms(TAIL, b"", b"", 9)
        found = stream.thread.lend(stream.source, stream.outer.fileno(), terms, b"x", lambda: None, print)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found is None and not stream.read_now() and stream.source.is_reading()


async def test_a_descriptor_that_is_given_to_another_gets_nothing_of_this_stream(stream: Stream) -> None:
    await stream.lend()
    number = stream.outer.fileno()
    kept_open = stream.reader
    stream.outer.close()
    other, far = socket.socketpair()
    if other.fileno() != number:
        os.dup2(other.fileno(), number)
    stream.engine.send(TOKENS[0])
    assert await stream.read(len(TOKENS[0])) == TOKENS[0]
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    stream.engine.send(LAST)
    await stream.came_back()
    assert kept_open is stream.reader
    for one in (other, far):
        one.close()
    with contextlib.suppress(OSError):
        os.close(number)


def pieces_of(said: bytes, dice: random.Random) -> Iterator[bytes]:
    while said:
        size = dice.choice((1, 3, 20, 80, 200, 5000))
        yield said[:size]
        said = said[size:]


async def one_life(thread: RelayThread, which: int, dice: random.Random) -> None:
    """A stream of its own text, cut anywhere, lent and taken back at any moment: the reader gets it whole."""
    name, loop = b"cmpl-%04d" % which, asyncio.get_running_loop()
    said = b"".join(token(b"%d of %d" % (i, which), name) for i in range(dice.randrange(1, 60))) + LAST
    stream = Stream(thread)
    got, owed = bytearray(), bytearray()

    async def write() -> None:
        for piece in pieces_of(said, dice):
            await loop.sock_sendall(stream.engine, piece)
            if dice.random() < 0.3:
                await asyncio.sleep(dice.random() * 0.003)

    async def read() -> None:
        while True:
            more = await loop.sock_recv(stream.reader, 1 << 16)
            if not more:
                return
            got.extend(more)

    await stream.lend()
    writer, reader = loop.create_task(write()), loop.create_task(read())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stream.returned.wait(), dice.random() * 0.05)
    assert stream.loan is not None
    returned = stream.loan.end()
    stream.source.pause_reading()
    await writer
    stream.engine.close()
    owed += returned.unsent + returned.rest
    with stream.inner.dup() as inner:
        while more := await loop.sock_recv(inner, 1 << 16):
            owed += more
    await loop.sock_sendall(stream.outer, bytes(owed))
    stream.outer.shutdown(socket.SHUT_WR)
    await asyncio.wait_for(reader, TIMEOUT_S)
    assert bytes(got) == said
    if returned.kept is not None:
        assert said.startswith(returned.kept.copied())
    stream.close()


def test_hundreds_at_once_taken_back_at_any_moment() -> None:
    async def run() -> None:
        thread = RelayThread.start(asyncio.get_running_loop())
        assert thread is not None
        for round_ in range(4):
            await asyncio.gather(*(one_life(thread, i, random.Random(1000 * round_ + i)) for i in range(150)))
        assert not thread.num_lent
        thread.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(run(), 120))

from __future__ import annotations

import itertools
from typing import Any

import orjson
import pytest

from proxy import http1
from proxy.client_stream import USAGE as USAGE_MARK
from proxy.client_stream import ClientStream, token_tail
from proxy.continuation import Continuation, NotExact
from proxy.openai_api import parse_call
from proxy.report import output_tokens_of

ENDS = [b"\n\n", b"\r\n\r\n"]


def event(choice: dict[str, Any] | None, end: bytes = b"\n\n", **more: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, **choice}]
    return b"data: " + orjson.dumps({"id": "a", "created": 1, "model": "m", "choices": choices, **more}) + end


def token(text: str, end: bytes = b"\n\n", **more: Any) -> bytes:
    return event({"text": text, "finish_reason": None, **more}, end)


USAGE = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, "prompt_tokens_details": {"cached_tokens": 9}}
RECOMPUTED = event({"text": "", "finish_reason": "stop", "stop_reason": "recomputed"})
DONE = b"data: [DONE]\n\n"


class Client:
    def __init__(
        self,
        *,
        chunked: bool = True,
        one_choice: bool = True,
        room: int = 1 << 20,
        event_room: int = 1 << 20,
        is_named: bool = False,
    ):
        self.raw = b""
        self.stream = ClientStream(
            self._write,
            chunked=chunked,
            one_choice=one_choice,
            is_named=is_named,
            max_kept_bytes=room,
            max_event_bytes=event_room,
        )
        self.chunked = chunked

    def _write(self, data: bytes) -> None:
        assert data
        self.raw += data

    def get(self, reads: list[bytes], chunked_in: bool = True) -> bytes:
        sink = self.stream.begin(b"HEAD", reads[0], chunked_in)
        for read in reads[1:]:
            sink(read)
        return self.payload

    @property
    def payload(self) -> bytes:
        assert self.raw.startswith(b"HEAD")
        body = self.raw[4:]
        return http1.dechunk(body) if self.chunked else body

    @property
    def is_complete(self) -> bool:
        decoder = http1.ChunkDecoder()
        decoder.feed(self.raw[4:])
        return decoder.complete


def body_of(events: list[bytes], together: int = 1) -> bytes:
    batches = [b"".join(events[i : i + together]) for i in range(0, len(events), together)]
    return b"".join(map(http1.chunk, batches)) + http1.LAST_CHUNK


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_usage_gets_the_prefillers_number_wherever_reads_are_cut(end: bytes, together: int, chunked: bool) -> None:
    tokens = [token(text, end) for text in ("a", "b", "c")]
    body = body_of([*tokens, event(None, end, usage=USAGE), DONE], together)
    right = {**USAGE, "prompt_tokens_details": {"cached_tokens": 2}}
    expected = b"".join([*tokens, event(None, usage=right), DONE])
    for cut in range(len(body) + 1):
        client = Client(chunked=chunked)
        client.stream.cached_tokens = 2
        assert client.get([body[:cut], body[cut:]]) == expected, cut
        client.stream.end()
        assert not chunked or (client.is_complete and client.raw.count(http1.LAST_CHUNK) == 1), cut


def test_reads_of_every_size_come_to_the_same() -> None:
    body = body_of([token(text) for text in "abcdef"] + [event(None, usage=USAGE), DONE], 3)
    for size in range(1, 60):
        client = Client()
        client.stream.cached_tokens = 9
        read = client.get([body[i : i + size] for i in range(0, len(body), size)])
        assert read == http1.dechunk(body)
        assert client.is_complete


def test_whole_token_events_are_passed_on_as_they_are() -> None:
    client, reads = Client(), [http1.chunk(token(text)) for text in "abc"]
    sink = client.stream.begin(b"HEAD", reads[0], True)
    for read in reads[1:]:
        sink(read)
        assert client.raw.endswith(read)
    assert client.raw == b"HEAD" + b"".join(reads)


def test_a_decoder_that_gave_up_is_not_heard_wherever_reads_are_cut() -> None:
    tokens = [token("a"), token("b")]
    body = body_of([*tokens, RECOMPUTED, DONE])
    for cut in range(len(body) + 1):
        client = Client()
        assert client.get([body[:cut], body[cut:]]) == b"".join(tokens), cut
        assert client.stream.broken_by == "recomputed" and not client.is_complete
        delivered = client.stream.delivered()
        assert delivered is not None and delivered.text == "ab" and delivered.finish_reason is None


def test_a_loss_at_any_byte_leaves_the_client_between_two_events_and_the_rest_fits() -> None:
    """Every byte but the last event is told by the delivered text; a rest joins it to the whole."""
    call = parse_call("completions", b'{"prompt":"p","max_tokens":5,"stream":true}')
    texts = ["a", "bé", "c☃", "d", "e"]
    for together, chunked in itertools.product((1, 2), (True, False)):
        body = body_of([token(text) for text in texts], together).removesuffix(http1.LAST_CHUNK)
        for cut in range(len(body) + 1):
            client = Client(chunked=chunked)
            payload = client.get([body[: cut // 2], body[cut // 2 : cut]])
            assert not payload or payload.endswith(b"\n\n")
            delivered = client.stream.delivered()
            assert delivered is not None and client.stream.is_whole_events
            if delivered.num_tokens == 5:
                with pytest.raises(NotExact, match="nothing_left"):
                    Continuation(call, delivered, 1)
                continue
            client.stream.continuation = rest = Continuation(call, delivered, 1)
            assert rest.call.fields["prompt"] == "p" + delivered.text
            left = texts[delivered.num_tokens :]
            assert rest.call.fields["max_tokens"] == len(left)
            sink = client.stream.begin(b"", body_of([token(text) for text in left]), True)
            assert sink is not None
            again = client.stream.delivered()
            assert again is not None and again.text == "".join(texts) and again.num_tokens == 5


def test_a_body_without_chunks_gets_them() -> None:
    payload = token("a") + event(None, usage=USAGE) + DONE
    client = Client()
    assert client.get([payload[:30], payload[30:]], chunked_in=False) == payload
    client.stream.end()
    assert client.is_complete


def test_an_event_beyond_the_limit_is_passed_on_in_parts_and_never_continued() -> None:
    body = body_of([token("a" * 500)])
    client = Client(event_room=100)
    client.get([body[:300]])
    assert len(client.payload) > 100
    assert not client.stream.is_whole_events and client.stream.delivered() is None


@pytest.mark.parametrize("num_bytes", [100, 1000])
def test_what_is_kept_is_bounded(num_bytes: int) -> None:
    client = Client(room=num_bytes)
    sink = client.stream.begin(b"HEAD", http1.chunk(token("x")), True)
    for _ in range(3 + num_bytes // 50):
        sink(http1.chunk(token("y")))
    assert client.stream.delivered() is None
    assert client.payload.count(b'"y"') == 3 + num_bytes // 50


def test_the_tail_of_a_token_says_that_nothing_is_finished() -> None:
    plain = http1.chunk(token("a"))
    tail = token_tail(plain)
    assert tail and plain.endswith(tail)
    for other in (http1.chunk(RECOMPUTED), http1.chunk(event(None, usage=USAGE)), http1.chunk(token("b"))[:-3]):
        assert not other.endswith(tail)
        assert not token_tail(other)
    assert not token_tail(http1.chunk(token("a", usage=USAGE)))


def test_several_choices_are_looked_at_one_by_one() -> None:
    """One can be given up while the other goes on, in the same read."""
    other = event({"text": "x", "index": 1, "finish_reason": None})
    client = Client(one_choice=False)
    client.get([http1.chunk(token("a")), http1.chunk(RECOMPUTED) + http1.chunk(other)])
    assert client.stream.broken_by == "recomputed" and b"recomputed" not in client.raw


@pytest.mark.parametrize("code", [500, 400])
def test_an_error_in_mid_stream_is_a_loss_if_it_is_the_engines(code: int) -> None:
    error = b"data: " + orjson.dumps({"error": {"message": "m", "code": code}}) + b"\n\n"
    client = Client()
    client.get([http1.chunk(token("a")), http1.chunk(error) + http1.chunk(DONE) + http1.LAST_CHUNK])
    assert (client.stream.broken_by, client.stream.error) == (("error_event", error) if code == 500 else ("", b""))
    assert client.payload == token("a") + (b"" if code == 500 else error + DONE)


def test_what_follows_an_error_of_the_first_read_is_swallowed() -> None:
    error = b"data: " + orjson.dumps({"error": {"message": "m", "code": 500}}) + b"\n\n"
    client = Client()
    client.get([http1.chunk(token("a")) + http1.chunk(error) + http1.chunk(token("b")), http1.chunk(token("c"))])
    assert client.stream.broken_by == "error_event" and client.payload == token("a")


@pytest.mark.parametrize("said", [b"", b"\ndata: nonsense"])
def test_an_error_without_words_is_not_passed_on(said: bytes) -> None:
    client = Client(is_named=True)
    client.get([http1.chunk(token("a")), http1.chunk(b"event: error" + said + b"\n\n")])
    assert (client.stream.broken_by, client.stream.error, client.payload) == ("error_event", b"", token("a"))


def test_nothing_is_kept_where_nothing_may_be() -> None:
    """Where no answer is ever gone on with (--max-continuations 0)."""
    client = Client(room=-1)
    reads = [http1.chunk(token(one)) for one in "abcd"]
    client.get([*reads[:2], reads[2][:9], reads[2][9:] + reads[3], http1.chunk(DONE) + http1.LAST_CHUNK])
    assert client.payload == b"".join(map(token, "abcd")) + DONE
    assert client.stream.delivered() is None and not client.stream._kept


LEG = b'"id":"cmpl-r-0123456789abcdef"'


@pytest.mark.parametrize("whole", [False, True], ids=["relayed", "whole"])
def test_a_stream_whose_framing_broke_goes_on_wherever_reads_are_cut(whole: bool) -> None:
    call = parse_call("completions", b'{"prompt":"p","max_tokens":5,"stream":true}')
    body = b"".join(map(http1.chunk, map(token, "ab"))) + b"no length of a chunk\r\n"
    for cut in range(len(body) + 1):
        client = Client()
        client.get([body[:cut], body[cut:]])
        assert client.stream.garbled
        delivered = client.stream.delivered()
        assert delivered is not None and "ab".startswith(delivered.text)
        client.stream.continuation = Continuation(call, delivered, 3)
        rest = [*map(token, "abcde"[len(delivered.text) :]), DONE]
        if whole:
            client.stream.feed_whole(b"", b"".join(rest))
        else:
            client.stream.begin(b"", body_of(rest), True)
        client.stream.end()
        assert not client.stream.garbled and client.is_complete
        texts = [orjson.loads(one[6:])["choices"][0]["text"] for one in client.payload.split(b"\n\n")[:-2]]
        assert "".join(texts) == "abcde" and client.payload.endswith(DONE)


@pytest.mark.parametrize("room", [-1, 1 << 20])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("own", ["r", "r" * 40])
def test_the_clients_id_however_the_stream_is_split(own: str, chunked: bool, room: int) -> None:
    """Also where the client's is longer than the leg's."""
    events = [one.replace(b'"id":"a"', LEG) for one in (*map(token, "abc"), event(None, usage=USAGE))]
    raw = body_of([*events, DONE])
    for cut in range(len(raw) - 1, len(http1.chunk(events[0])) - 1, -7):
        client = Client(chunked=chunked, room=room)
        client.stream.ids = ("r-0123456789abcdef", own)
        client.stream.cached_tokens = 2
        client.get([raw[:cut], raw[cut:]])
        client.stream.end()
        *told, done = client.payload.split(b"\n\n")[:-1]
        assert done == DONE[:-2] and [orjson.loads(one[6:])["id"] for one in told] == ["cmpl-" + own] * 4
        assert [orjson.loads(one[6:])["choices"][0]["text"] for one in told[:3]] == ["a", "b", "c"]
        assert orjson.loads(told[3][6:])["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


def test_read_by_read_an_id_is_replaced_by_one_as_long() -> None:
    reads = [http1.chunk(token(one).replace(b'"id":"a"', LEG)) for one in "abcd"]
    client = Client()
    client.stream.ids = ("r-0123456789abcdef", "r")
    client.get(reads)
    assert client.raw == b"HEAD" + b"".join(reads).replace(LEG, b'"id":"cmpl-r"'.ljust(len(LEG)))
    found = client.stream.delivered()
    assert found is not None and (found.first["id"], found.text) == ("cmpl-r", "abcd")


@pytest.mark.parametrize("room", [10, 1 << 20], ids=["nothing kept", "all kept"])
def test_a_usage_is_found_wherever_its_event_is_torn(room: int) -> None:
    told = http1.chunk(token("a") * 40 + event(None, usage=USAGE))
    for cut in range(told.index(USAGE_MARK) + len(USAGE_MARK), len(told)):
        client = Client(room=room)
        client.get([http1.chunk(token("b") * 3), told[:cut], told[cut:], http1.chunk(DONE) + http1.LAST_CHUNK])
        assert output_tokens_of(client.stream.last_reads) == 3, told[:cut]

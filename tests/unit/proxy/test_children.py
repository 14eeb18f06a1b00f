"""Children and their family, told what to say by hand: what the client reads, in which order, and who is ended."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from proxy.children import Child, Family
from proxy.downstream import Relayed
from proxy.errors import Failure, ProxyError
from proxy.flow import Flow
from proxy.http1 import RequestHead
from proxy.openai_api import parse_call
from proxy.retry import Budget

WHOLE = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n%b"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\n\r\n"


class Client:
    """Where the answer goes; `text` is all of it."""

    def __init__(self) -> None:
        self.text = b""
        self.source: Relayed | None = None

    @property
    def transport(self) -> asyncio.WriteTransport:
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        self.text += data

    def lendable(self) -> int | None:
        return None

    def relay_from(self, upstream: Relayed | None) -> None:
        self.source = upstream

    def end_relay(self, failure: Failure) -> None: ...

    def answered(self, *, close: bool) -> None: ...

    def break_off(self) -> None: ...


class Source:
    """What a child is relayed from."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def pause(self) -> None:
        self.said.append("pause")

    def resume(self) -> None:
        self.said.append("resume")

    def stop_relay(self) -> None:
        self.said.append("stop")

    def end_relay(self, failure: Failure) -> None:
        self.said.append(failure.value)


class Scene:
    """A request of two prompts, its children's tasks idle for ever."""

    def __init__(self, version: str = "1.1", **fields: Any) -> None:
        head = RequestHead()
        head.feed(b"POST /v1/completions HTTP/%b\r\nHost: a\r\n\r\n" % version.encode())
        self.client = Client()
        self.parent = self._flow(self.client, head, "r")
        body = orjson.dumps({"prompt": ["a", "b"], **fields})
        self.parent.call = parse_call("completions", body)
        self.children: list[Child] = []
        self.bodies: list[bytes] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.family = Family(self.parent, self._make, self._serve)
        self.answer = asyncio.ensure_future(self.family.answer())

    def _flow(self, client: Any, head: RequestHead, name: str) -> Flow:
        return Flow(client, head, "completions", name, Budget(1, 0), 0.0)

    def _make(self, child: Child, head: RequestHead, name: str) -> Flow:
        self.children.append(child)
        return self._flow(child, head, name)

    def _serve(self, flow: Flow, body: bytes) -> asyncio.Task[None]:
        self.bodies.append(body)
        self.tasks.append(asyncio.ensure_future(asyncio.Event().wait()))  # type: ignore[arg-type]
        return self.tasks[-1]

    async def ended(self) -> None:
        await asyncio.wait_for(self.answer, 5)
        assert all(task.cancelled() for task in self.tasks)

    def say(self, index: int, data: bytes) -> None:
        self.children[index].write(data)

    def event(self, index: int, text: str) -> None:
        said = b"data: " + event_of(text, f"cmpl-r-c{index}") + b"\n\n"
        self.say(index, b"%x\r\n%b\r\n" % (len(said), said))

    def end(self, index: int) -> None:
        self.say(index, b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        self.children[index].answered(close=False)


def event_of(text: str, name: str = "cmpl-r", index: int = 0) -> bytes:
    return orjson.dumps({"id": name, "choices": [{"index": index, "text": text}]})


async def started(**more: Any) -> Scene:
    scene = Scene(**more)
    await asyncio.sleep(0)
    return scene


def whole(status: int, **fields: Any) -> bytes:
    body = orjson.dumps(fields)
    return WHOLE % (status, len(body), body)


async def test_nothing_is_said_before_all_whole_answers_are_there() -> None:
    scene = await started()
    assert [orjson.loads(body)["prompt"] for body in scene.bodies] == ["a", "b"]
    for index in (1, 0):
        assert not scene.client.text
        scene.say(index, whole(200, id=f"cmpl-r-c{index}", choices=[{"index": 0, "text": str(index)}]))
        scene.children[index].answered(close=False)
    await scene.ended()
    head, _, body = scene.client.text.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"X-Request-Id: r" in head
    assert orjson.loads(body) == {
        "id": "cmpl-r", "choices": [{"index": 0, "text": "0"}, {"index": 1, "text": "1"}],
    }  # fmt: skip
    assert (scene.parent.status, scene.parent.outcome) == (200, "ok")


async def test_an_error_is_passed_on_with_its_head_and_ends_the_others() -> None:
    scene = await started()
    source = Source()
    scene.say(0, STREAM)
    scene.children[0].relay_from(source)
    scene.say(1, whole(429, error={"code": 429}))
    scene.children[1].flow.outcome = "refused"
    scene.children[1].answered(close=False)
    await scene.ended()
    assert scene.client.text.startswith(b"HTTP/1.1 429") and b"Retry-After: 3" in scene.client.text
    assert scene.client.text.endswith(b'{"error":{"code":429}}')
    assert (scene.parent.status, scene.parent.outcome, source.said) == (429, "refused", ["stop"])


async def test_a_stream_opens_with_the_first_event_and_takes_them_as_they_come() -> None:
    scene = await started(stream=True)
    for index in (0, 1):
        scene.say(index, STREAM)
    assert not scene.client.text
    scene.event(1, "x")
    assert scene.client.text.startswith(b"HTTP/1.1 200") and b"X-A: 1" in scene.client.text
    assert scene.client.text.endswith(b"data: " + event_of("x", index=1) + b"\n\n\r\n")
    scene.event(0, "y")
    assert scene.client.text.endswith(b"data: " + event_of("y") + b"\n\n\r\n")
    scene.end(1)
    assert b"[DONE]" not in scene.client.text
    scene.end(0)
    await scene.ended()
    assert scene.client.text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and scene.client.text.count(b"[DONE]") == 1


async def test_an_error_after_the_first_event_is_an_event() -> None:
    scene = await started(stream=True)
    scene.say(0, STREAM)
    scene.event(0, "x")
    scene.say(1, whole(503, error={"message": "no room"}))
    scene.children[1].answered(close=False)
    await scene.ended()
    assert b'data: {"error":{"message":"no room"}}\n\ndata: [DONE]\n\n' in scene.client.text
    assert scene.client.text.endswith(b"0\r\n\r\n") and scene.parent.outcome != "ok"


async def test_a_childs_error_event_is_the_last() -> None:
    scene = await started(stream=True)
    scene.say(0, STREAM)
    scene.event(0, "x")
    error = b'data: {"error":{"message":"lost"}}\n\n'
    scene.say(0, b"%x\r\n%b\r\n" % (len(error), error))
    scene.event(0, "late")
    scene.say(1, STREAM)
    scene.event(1, "late")
    await scene.ended()
    assert b"late" not in scene.client.text and scene.client.text.count(error) == 1


@pytest.mark.parametrize("opened", [False, True])
async def test_a_child_that_breaks_off(opened: bool) -> None:
    scene = await started(stream=True)
    scene.say(0, STREAM)
    if opened:
        scene.event(0, "x")
    scene.children[0].break_off()
    if opened:
        await scene.ended()
        assert b'data: {"error"' in scene.client.text and scene.client.text.endswith(b"0\r\n\r\n")
    else:
        with pytest.raises(ProxyError, match="lost"):
            await scene.ended()
        assert not scene.client.text


async def test_answers_that_cannot_be_joined_are_502() -> None:
    scene = await started()
    for index in (0, 1):
        scene.say(index, whole(200, choices=[]))
        scene.children[index].answered(close=False)
    with pytest.raises(ProxyError, match="joined") as caught:
        await scene.ended()
    assert caught.value.status == 502


async def test_the_readers_pace_is_every_childs() -> None:
    scene = await started(stream=True)
    sources = [Source(), Source()]
    scene.children[0].relay_from(sources[0])
    scene.say(0, STREAM)
    scene.event(0, "x")
    assert scene.client.source is scene.family
    scene.family.pause()
    scene.children[1].relay_from(sources[1])  # it starts while the reader is slow
    scene.family.resume()
    assert [source.said for source in sources] == [["pause", "resume"]] * 2
    scene.answer.cancel()
    await asyncio.wait([scene.answer])
    assert all(task.cancelled() for task in scene.tasks)
    assert [source.said[-1] for source in sources] == ["stop"] * 2
    scene.event(0, "late")
    assert b"late" not in scene.client.text


async def test_an_old_client_gets_the_events_unframed() -> None:
    scene = await started(version="1.0", stream=True)
    for index in (0, 1):
        scene.say(index, STREAM)
        scene.event(index, "x")
        scene.end(index)
    await scene.ended()
    assert scene.client.text.endswith(b"\n\ndata: [DONE]\n\n") and b"chunked" not in scene.client.text
    assert scene.parent.close and scene.children[0].flow.head.version == "1.1"


async def test_a_request_out_of_time_ends_with_an_error_event() -> None:
    scene = await started(stream=True)
    scene.say(0, STREAM)
    scene.event(0, "x")
    scene.family.end_relay(Failure.OUT_OF_TIME)
    await scene.ended()
    assert b"--total-timeout-s" in scene.client.text and scene.client.text.endswith(b"0\r\n\r\n")
    assert scene.parent.outcome == Failure.OUT_OF_TIME.value

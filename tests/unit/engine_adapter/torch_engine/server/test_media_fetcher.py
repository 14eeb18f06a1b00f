"""Fetching from real servers on loopback; names are answered by a stand-in for the DNS."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from engine_adapter.torch_engine.media_fetcher import (
    MediaError,
    MediaFetcher,
    MediaLimits,
    Room,
    decode_data_url,
    look_up,
)

CONTENT = b"\x89PNG" + b"x" * 5000
MAX_BYTES = 10_000


class Names:
    """Answers a name with its next list of addresses, the last one for ever; remembers what was asked."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int, family: socket.AddressFamily) -> list[str]:
        self.asked.append(host)
        known = self.answers.get(host.partition(".")[0])
        if known is None:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return known.pop(0) if len(known) > 1 else known[0]


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server of pictures, redirects and trouble."""

    async def picture(request: web.Request) -> web.StreamResponse:
        return web.Response(body=CONTENT)

    async def redirect(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.query["to"]})

    async def loop(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "/loop"})

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"x")
        await asyncio.sleep(30)
        return response

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 4096)

    async def bomb(request: web.Request) -> web.StreamResponse:
        return web.Response(body=gzip.compress(bytes(10**6)), headers={"Content-Encoding": "gzip"})

    app = web.Application()
    for name, handler in locals().items():
        if asyncio.iscoroutinefunction(handler):
            app.router.add_get(f"/{name}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


def fetcher(names: Any = look_up, **limits: Any) -> MediaFetcher:
    return MediaFetcher(
        MediaLimits(**{"max_bytes": MAX_BYTES, "timeout_s": 20.0, "allow_private": True, **limits}), names
    )


async def test_a_picture_by_address_and_by_name(port: int) -> None:
    assert await fetcher().fetch(f"http://127.0.0.1:{port}/picture", Room(MAX_BYTES)) == CONTENT
    names = Names(pictures=[["127.0.0.1"]])
    assert await fetcher(names).fetch(f"http://pictures.test:{port}/picture", Room(MAX_BYTES)) == CONTENT
    assert await fetcher().fetch(f"http://127.0.0.1:{port}/redirect?to=/picture", Room(MAX_BYTES)) == CONTENT


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[64:ff9b::7f00:1]",
     "0.0.0.0", "100.64.0.1"],
)  # fmt: skip
async def test_private_addresses_are_refused_unasked(host: str) -> None:
    names = Names()
    with pytest.raises(MediaError, match="no public address"):
        await fetcher(names, allow_private=False).fetch(f"http://{host}:1/x", Room(MAX_BYTES))
    assert names.asked == []


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f000001", "127.1"])
async def test_other_spellings_of_loopback_are_refused(host: str) -> None:
    with pytest.raises(MediaError, match=r"no public address|can't be fetched"):
        await fetcher(allow_private=False).fetch(f"http://{host}:1/x", Room(MAX_BYTES))


async def test_one_private_address_among_public_ones_is_enough() -> None:
    names = Names(mixed=[["8.8.8.8", "10.0.0.7"]])
    with pytest.raises(MediaError, match=r"mixed\.test is 10\.0\.0\.7, which is no public address"):
        await fetcher(names, allow_private=False).fetch("http://mixed.test:1/x", Room(MAX_BYTES))


async def test_the_address_judged_is_the_one_connected_to(port: int) -> None:
    """DNS rebinding: the second answer of the name would lead elsewhere, and is never asked for."""
    names = Names(rebound=[["127.0.0.1"], ["127.0.0.66"]])
    assert await fetcher(names).fetch(f"http://rebound.test:{port}/picture", Room(MAX_BYTES)) == CONTENT
    assert names.asked == ["rebound.test"]


async def test_a_name_that_turns_private_between_redirects_is_refused(port: int, monkeypatch: Any) -> None:
    """127.0.0.1 stands for a public address here; the name's second answer is one that does not."""
    names = Names(turning=[["127.0.0.1"], ["127.0.0.2"]])
    guarded = fetcher(names, allow_private=False)
    monkeypatch.setattr("engine_adapter.torch_engine.media_fetcher.is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(MediaError, match=r"127\.0\.0\.2, which is no public address"):
        await guarded.fetch(f"http://turning.test:{port}/redirect?to=/picture", Room(MAX_BYTES))


@pytest.mark.parametrize("to", ["http://10.0.0.1/x", "http://[::1]/x", "http://inner.test/x"])
async def test_a_redirect_to_a_private_address_is_refused(port: int, to: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("engine_adapter.torch_engine.media_fetcher.is_public", lambda address: address == "127.0.0.1")
    guarded = fetcher(Names(inner=[["192.168.0.9"]]), allow_private=False)
    with pytest.raises(MediaError, match="no public address"):
        await guarded.fetch(f"http://127.0.0.1:{port}/redirect?to={to}", Room(MAX_BYTES))


@pytest.mark.parametrize(
    ("path", "words"),
    [("loop", "more than 5 redirects"), ("endless", "larger than"), ("bomb", "compressed"), ("nothing", "status 404"),
     ("redirect?to=file:///etc/passwd", "give an http, https or data URL"),
     ("redirect?to=data:,x", "give an http, https or data URL")],
)  # fmt: skip
async def test_trouble(port: int, path: str, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        await fetcher().fetch(f"http://127.0.0.1:{port}/{path}", Room(MAX_BYTES))


async def test_the_limit_of_bytes(port: int) -> None:
    url = f"http://127.0.0.1:{port}/picture"
    assert await fetcher().fetch(url, Room(len(CONTENT))) == CONTENT
    with pytest.raises(MediaError, match=f"larger than {len(CONTENT) - 1} bytes"):
        await fetcher().fetch(url, Room(len(CONTENT) - 1))


async def test_several_at_once_share_the_room(port: int) -> None:
    room = Room(2 * len(CONTENT) + 1)
    url = f"http://127.0.0.1:{port}/picture"
    assert await asyncio.gather(*(fetcher().fetch(url, room) for _ in range(2))) == [CONTENT] * 2
    with pytest.raises(MediaError, match="larger than"):
        await fetcher().fetch("data:,xy", room)


async def test_the_limit_of_time_holds_for_the_whole_body(port: int) -> None:
    with pytest.raises(MediaError, match="did not come within"):
        await fetcher(timeout_s=0.3).fetch(f"http://127.0.0.1:{port}/slow", Room(MAX_BYTES))


async def test_allowed_domains_hold_for_redirects_too(port: int) -> None:
    names = Names(good=[["127.0.0.1"]], bad=[["127.0.0.1"]])
    choosy = fetcher(names, allowed_domains=("good.test",))
    assert await choosy.fetch(f"http://good.test:{port}/picture", Room(MAX_BYTES)) == CONTENT
    for url in (
        f"http://bad.test:{port}/picture",
        f"http://good.test:{port}/redirect?to=http://bad.test:{port}/picture",
        f"http://good.test@bad.test:{port}/picture",
    ):
        with pytest.raises(MediaError, match=r"'bad\.test' is none of the allowed domains"):
            await choosy.fetch(url, Room(MAX_BYTES))
    assert "bad.test" not in names.asked


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "/etc/passwd", "", "http://", "http://["])
async def test_other_urls(url: str) -> None:
    with pytest.raises(MediaError, match=r"URL"):
        await fetcher().fetch(url, Room(MAX_BYTES))


async def test_an_unknown_name_and_a_closed_port() -> None:
    with pytest.raises(MediaError, match="can't be fetched"):
        await fetcher(Names()).fetch("http://nobody.test/x", Room(MAX_BYTES))
    with pytest.raises(MediaError, match="can't be fetched"):
        await fetcher().fetch("http://127.0.0.1:1/x", Room(MAX_BYTES))


async def test_a_querys_secrets_are_not_said() -> None:
    with pytest.raises(MediaError) as caught:
        await fetcher(Names()).fetch("http://nobody.test/x?signature=secret", Room(MAX_BYTES))
    assert "secret" not in str(caught.value)


async def test_data_urls() -> None:
    encoded = base64.b64encode(CONTENT).decode()
    assert await fetcher().fetch(f"DATA:image/png;base64,{encoded}", Room(len(CONTENT))) == CONTENT
    assert decode_data_url("data:,a%20b", Room(MAX_BYTES)) == b"a b"
    for url, words in (
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,???", "base64"),
        ("data:image/png;base64,YQ", "base64"),
        (f"data:image/png;base64,{encoded}", "larger than"),
    ):
        with pytest.raises(MediaError, match=words):
            decode_data_url(url, Room(len(CONTENT) - 1))

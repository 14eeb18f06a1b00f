"""The bytes behind an `image_url`: out of a data URL, or fetched under limits of size, time and address.

A name is looked up once a connection: the addresses that were judged are those that are connected to, so that a second
answer of the DNS changes nothing. Redirects are followed by hand, each judged like the first URL.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from engine_adapter.torch_engine.media_addresses import is_allowed_domain, is_public, literal_address

MAX_REDIRECTS = 5
MAX_CONNECTIONS = 64
"""URLs fetched at a time, over all requests; waiting for a turn is part of a URL's time."""
MAX_URL_CHARS = 8192
"""Of an http(s) URL; servers take no longer ones."""
_SHOWN_CHARS = 200
_REDIRECTS = (301, 302, 303, 307, 308)

Lookup = Callable[[str, int, socket.AddressFamily], Awaitable[list[str]]]


class MediaError(Exception):
    """An image can't be had by the URL it was asked for, as the message says."""


@dataclass(frozen=True, slots=True)
class MediaLimits:
    max_bytes: int
    """All of a request's files together."""
    timeout_s: float
    """One URL, redirects included."""
    allowed_domains: tuple[str, ...] = ()
    allow_private: bool = False


async def look_up(host: str, port: int, family: socket.AddressFamily) -> list[str]:
    """All addresses of a name, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class Room:
    """How many bytes the files of one request may still have, however many are on their way at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._left_bytes = max_bytes

    def check(self, num_bytes: int) -> None:
        """Raises MediaError where that many more are too many."""
        if num_bytes > self._left_bytes:
            raise MediaError(f"the request's images are larger than {self._max_bytes} bytes (--max-media-bytes)")

    def take(self, num_bytes: int) -> None:
        self.check(num_bytes)
        self._left_bytes -= num_bytes


class MediaFetcher:
    """Makes a connection of its own for every fetch: nothing is kept between requests."""

    def __init__(self, limits: MediaLimits, lookup: Lookup = look_up) -> None:
        self.limits = limits
        self._lookup = lookup
        self._connections = asyncio.Semaphore(MAX_CONNECTIONS)

    async def fetch(self, url: str, room: Room) -> bytes:
        """Raises MediaError."""
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(decode_data_url, url, room)
        target = self._checked(url)
        try:
            async with asyncio.timeout(self.limits.timeout_s), self._connections:
                return await self._fetch_http(target, room)
        except TimeoutError:
            raise MediaError(
                f"{shown(url)} did not come within {self.limits.timeout_s:g} s (--media-fetch-timeout-s)"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = str(error).strip() or type(error).__name__
            raise MediaError(f"{shown(url)} can't be fetched ({reason[:_SHOWN_CHARS]})") from error

    def _checked(self, url: str) -> URL:
        """Raises MediaError for whatever can be refused without asking anybody."""
        if len(url) > MAX_URL_CHARS:
            raise MediaError(f"the URL has {len(url)} characters, more than {MAX_URL_CHARS}")
        try:
            target = URL(url)
        except ValueError as error:
            raise MediaError(f"{shown(url)} is no URL ({error})") from error
        if target.scheme not in ("http", "https") or not target.host:
            raise MediaError(f"{shown(url)}: give an http, https or data URL")
        if not is_allowed_domain(target.host, self.limits.allowed_domains):
            allowed = ", ".join(self.limits.allowed_domains)
            raise MediaError(f"{target.host!r} is none of the allowed domains: {allowed} (--allowed-media-domains)")
        address = literal_address(target.host)
        if address is not None:
            self._check_address(target.host, address)
        return target

    def _check_address(self, host: str, address: str) -> None:
        if not self.limits.allow_private and not is_public(address):
            said = address if host in (address, f"[{address}]") else f"{host} is {address}, which"
            raise MediaError(f"{said} is no public address (--allow-private-media would allow it)")

    async def _fetch_http(self, target: URL, room: Room) -> bytes:
        resolver = CheckedResolver(self._lookup, self._check_address)
        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "pd-engine"}
                async with session.get(target, allow_redirects=False, headers=headers) as response:
                    if response.status not in _REDIRECTS:
                        return await _read(response, room)
                    target = self._checked(str(target.join(URL(response.headers.get("Location", "")))))
        raise MediaError(f"{shown(str(target))}: more than {MAX_REDIRECTS} redirects")


class CheckedResolver(AbstractResolver):
    """Looks a name up and lets none of its addresses pass if one of them may not be connected to."""

    def __init__(self, lookup: Lookup, check: Callable[[str, str], None]) -> None:
        self._lookup = lookup
        self._check = check

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises MediaError, and OSError for a name that nobody knows."""
        addresses = await self._lookup(host, port, family)
        for address in addresses:
            self._check(host, address)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in dict.fromkeys(addresses)
        ]

    async def close(self) -> None:
        return None


async def _read(response: aiohttp.ClientResponse, room: Room) -> bytes:
    url = shown(str(response.url))
    if response.status != 200:
        raise MediaError(f"{url} answered with status {response.status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise MediaError(f"{url} came compressed, though asked not to")
    room.check(response.content_length or 0)
    content = bytearray()
    async for piece in response.content.iter_any():
        room.take(len(piece))
        content += piece
    return bytes(content)


def decode_data_url(url: str, room: Room) -> bytes:
    """Raises MediaError."""
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise MediaError("the data URL has no comma: write data:image/png;base64,...")
    if not head.lower().replace(" ", "").endswith(";base64"):
        content = unquote_to_bytes(body)
    else:
        room.check(len(body) * 3 // 4 - 2)
        try:
            content = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise MediaError(f"the data URL is not valid base64 ({error})") from error
    room.take(len(content))
    return content


def shown(url: Any) -> str:
    """A URL in an error: without what may be a secret in its query, and not all of a long one."""
    text = str(url).partition("?")[0]
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."

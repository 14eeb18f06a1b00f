"""Routes that are not ours (`/tokenize`, `/v1/embeddings`, `/pooling`, ...): passed to an instance that has them.

The least loaded instance of each role is asked first, then the others; one that answers 404 or 405 is not asked for
that route again for a while. Bytes pass both ways as they come: method, target, headers and body are the client's, but
for hop-by-hop fields. A body of up to `HOLD_BYTES` is held, so that another instance can be asked; JSON is held whole,
because a client's own `kv_transfer_params` must not reach an engine (design.md, rules of every contract).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from time import monotonic
from typing import Any

import aiohttp
import orjson
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from proxy.config import ProxyConfig
from proxy.errors import BadRequest, ProxyError, TooLarge
from proxy.instance import Fleet, Instance, Role
from proxy.openai_api import BOOTSTRAP_FIELDS, BYTES_PER_TOKEN, check_values
from proxy.report import Reporter
from proxy.request_fields import HOP_BY_HOP
from proxy.route_memory import RouteMemory

log = logging.getLogger(__name__)

HOLD_BYTES = 1 << 20
MAX_CONNECTIONS = 1000  # open at once to all instances together; beyond it requests wait
# Hop-by-hop (RFC 9110 section 7.6.1) and what the two HTTP stacks set themselves.
_NOT_PASSED = frozenset(("content-length", "expect", "host", *(name.decode() for name in HOP_BY_HOP)))
_OWN_NAMES = BOOTSTRAP_FIELDS | {"kv_transfer_params"}
_OWN_KEYS = tuple(name.encode() for name in _OWN_NAMES)
_BEFORE_JSON = re.compile(rb"[\xef\xbb\xbf\xff\xfe\x00 \t\r\n]+")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class _NextInstance(Exception):
    """This instance did not serve the request, and another may: `answer` is what it said of a missing object."""

    def __init__(self, reason: str, *, answer: web.Response | None = None, reached: bool = True) -> None:
        super().__init__(reason)
        self.answer = answer
        self.reached = reached


class _Body:
    """The request's body: `held` of it was read already, the rest (if any) comes from the client."""

    def __init__(self, request: web.Request, held: bytes, complete: bool, limit: int) -> None:
        self.held = held
        self.complete = complete
        self.taken = False
        self._request = request
        self._limit = limit

    def stream(self) -> bytes | AsyncIterator[bytes]:
        return self.held if self.complete else self._stream()

    async def _stream(self) -> AsyncIterator[bytes]:
        self.taken = True
        size = len(self.held)
        yield self.held
        async for data in self._request.content.iter_any():
            size += len(data)
            if size > self._limit:
                raise TooLarge(self._limit)
            yield data


class PassThrough:
    def __init__(self, config: ProxyConfig, fleet: Fleet, reporter: Reporter, own_bearer: bytes) -> None:
        self._config = config
        self._fleet = fleet
        self._reporter = reporter
        self._own_authorization = own_bearer.decode("latin-1").partition(":")[2].strip()
        self._memory = RouteMemory()
        self._session: aiohttp.ClientSession | None = None
        self.num_open = 0

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            config = self._config
            self._session = aiohttp.ClientSession(
                # a fresh connection each: a kept one may be closing, and a POST cannot be sent again
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=config.connect_timeout_s, sock_read=config.first_token_timeout_s
                ),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        return self._session

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.num_open += 1
        status, outcome, began = 0, "client_gone", monotonic()
        try:
            answer = await self._serve(request)
            status = answer.status
            outcome = "ok" if status < 400 else "client_error" if status < 500 else "upstream_error"
            return answer
        except ProxyError as error:
            status, outcome = error.status, "refused" if error.status < 500 else "error"
            raise
        finally:
            self.num_open -= 1
            given = request.headers.get("X-Request-Id", "")
            self._reporter.passed(given, status, outcome, monotonic() - began)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        said: web.Response | None = None
        trouble = ""
        for instance in self._in_order(request):
            load = instance.load.reserve(len(body.held) // BYTES_PER_TOKEN + 1)
            try:
                return await self._ask(request, instance, body)
            except _NextInstance as unserved:
                said = said or unserved.answer
                trouble = trouble if unserved.reached else str(unserved)
            finally:
                load.release()
            if body.taken:
                break
        if said is not None:
            return said
        if trouble:
            raise ProxyError(502, f"No instance could serve {request.path}: {trouble}.", error_type="upstream_error")
        raise ProxyError(404, f"There is no {request.path} here.", error_type="NotFoundError")

    async def _read(self, request: web.Request) -> _Body:
        """Hold the beginning of the body, or all of it. Raises ProxyError."""
        limit = self._config.max_body_bytes
        if (request.content_length or 0) > limit:
            raise TooLarge(limit)
        given = request.headers.get(hdrs.CONTENT_TYPE)
        is_json = given is None or "json" in request.content_type
        hold = limit if is_json else min(HOLD_BYTES, limit)
        held = bytearray()
        try:
            async with asyncio.timeout(self._config.request_read_timeout_s):
                while len(held) <= hold and not request.content.at_eof():
                    held += await request.content.readany()
                    if not is_json and _may_be_json(held):  # whatever its sender calls it
                        is_json, hold = True, limit
        except TimeoutError:
            raise ProxyError(408, "The request did not arrive in time.") from None
        complete = request.content.at_eof()
        if len(held) > limit:
            raise TooLarge(limit)
        if held and not self._config.allow_client_kv_transfer_params:
            if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
                raise ProxyError(415, "A compressed request body is not understood.", param="Content-Encoding")
            if is_json:
                _refuse_own_kv(bytes(held))
        return _Body(request, bytes(held), complete, limit)

    def _in_order(self, request: web.Request) -> Iterator[Instance]:
        """Whom to ask: the best of each role, then the others; not those known to lack the route."""
        now = monotonic()
        fit = [
            one
            for one in self._fleet.all
            if one.enabled and not self._memory.lacks((one.role, one.key), request.method, request.path, now)
        ]
        if not any(one.enabled for one in self._fleet.all):
            raise ProxyError(
                503, "No instance is enabled.", error_type="ServiceUnavailableError", retry_after_s=1
            )  # fmt: skip
        fit.sort(key=lambda one: (not one.health.healthy, one.load.all_requests, one.load.last_pick))
        best = [next((one for one in fit if one.role is role), None) for role in Role]
        first = sorted((one for one in best if one is not None), key=fit.index)
        for instance in [*first, *(one for one in fit if one not in first)]:
            self._fleet.picked(instance)
            yield instance

    async def _ask(self, request: web.Request, instance: Instance, body: _Body) -> web.StreamResponse:
        target = request.raw_path if request.raw_path.startswith("/") else request.rel_url.raw_path_qs
        pool = instance.pool
        url = URL(f"{'http' if pool.tls is None else 'https'}://{instance.address}{target}", encoded=True)
        headers = self._request_headers(request, instance, body)
        data = body.stream() if body.held or not body.complete else None
        try:
            async with self._client().request(
                request.method,
                url,
                headers=headers,
                data=data,
                allow_redirects=False,
                ssl=pool.tls if pool.tls is not None else True,
                server_hostname=pool.server_name if pool.tls is not None else None,
            ) as answer:
                _refuse_odd(instance, answer)
                if answer.status in (404, 405):
                    await self._lacking(request, instance, answer)
                return await self._relay(request, instance, answer)
        except aiohttp.ClientConnectorError as error:
            raise _NextInstance(f"{instance.key}: {error.strerror or 'not reached'}", reached=False) from None
        except aiohttp.ConnectionTimeoutError:
            raise _NextInstance(f"{instance.key}: no connection in time", reached=False) from None
        except TimeoutError:
            raise ProxyError(504, f"{instance.key} did not answer in time.", error_type="upstream_error") from None
        except aiohttp.ClientError as error:
            if request.method in ("GET", "HEAD", "OPTIONS") and body.complete:
                raise _NextInstance(f"{instance.key}: {error}", reached=False) from None
            raise ProxyError(502, f"{instance.key} failed: {error}.", error_type="upstream_error") from None

    def _request_headers(self, request: web.Request, instance: Instance, body: _Body) -> CIMultiDict[str]:
        headers = _passed(request.headers.items(), request.headers.get(hdrs.CONNECTION, ""))
        headers[hdrs.HOST] = str(instance.name)
        if self._own_authorization and hdrs.AUTHORIZATION not in headers:
            headers[hdrs.AUTHORIZATION] = self._own_authorization
        if not body.complete and request.content_length is not None:
            headers[hdrs.CONTENT_LENGTH] = str(request.content_length)
        return headers

    async def _lacking(self, request: web.Request, instance: Instance, answer: aiohttp.ClientResponse) -> None:
        """Its 404 may mean a route or an object (a model, a stored response): the first is remembered, the second is
        the answer if nobody has a better one. Raises _NextInstance."""
        said = b""
        while len(said) < HOLD_BYTES and (more := await answer.content.read(HOLD_BYTES - len(said))):
            said += more
        if answer.status == 404 and _names_an_object(said):
            headers = _passed(answer.headers.items(), answer.headers.get(hdrs.CONNECTION, ""))
            raise _NextInstance("no such object", answer=web.Response(body=said, status=404, headers=headers))
        self._memory.note((instance.role, instance.key), request.method, request.path, monotonic())
        raise _NextInstance("no such route")

    async def _relay(
        self, request: web.Request, instance: Instance, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        headers = _passed(answer.headers.items(), answer.headers.get(hdrs.CONNECTION, ""))
        if hdrs.LOCATION in headers:  # a redirect to itself is one to us
            scheme = "http" if instance.pool.tls is None else "https"
            headers[hdrs.LOCATION] = headers[hdrs.LOCATION].removeprefix(f"{scheme}://{instance.name}")
        given = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        length = answer.headers.get(hdrs.CONTENT_LENGTH)
        if length is not None:
            given.content_length = int(length)
        await given.prepare(request)
        try:
            async for data in answer.content.iter_any():
                await given.write(data)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("event=passed_answer_broken path=%s instance=%s reason=%r", request.path, instance.key, error)
            if request.transport is not None:
                request.transport.abort()  # never an end as if all were there
            return given
        await given.write_eof()
        return given


def _passed(fields: Iterable[tuple[str, str]], connection: str) -> CIMultiDict[str]:
    named = {token.strip().lower() for token in connection.split(",")}
    return CIMultiDict((k, v) for k, v in fields if k.lower() not in _NOT_PASSED and k.lower() not in named)


def _refuse_odd(instance: Instance, answer: aiohttp.ClientResponse) -> None:
    """aiohttp reads answers more leniently than the hot routes do. Raises ProxyError where one could be read in two
    ways."""
    fields = answer.headers
    codings, lengths = fields.getall(hdrs.TRANSFER_ENCODING, []), fields.getall(hdrs.CONTENT_LENGTH, [])
    is_chunked = (
        not lengths and answer.version == aiohttp.HttpVersion11 and [one.lower() for one in codings] == ["chunked"]
    )
    length_is_one = len(lengths) <= 1 and all(one.isascii() and one.isdigit() for one in lengths)
    if answer.status < 200 or (codings and not is_chunked) or not length_is_one or not all(map(_is_token, fields)):
        answer.close()
        raise ProxyError(502, f"{instance.key} gave a malformed answer.", error_type="upstream_error")


def _is_token(name: str) -> bool:
    return _TOKEN.fullmatch(name) is not None


def _names_an_object(body: bytes) -> bool:
    """Whether a 404 is about an object: vLLM says `NotFoundError` then, and a bare `Not Found` for a route."""
    return b'"NotFoundError"' in body


def _may_be_json(held: bytes | bytearray) -> bool:
    """Or only blanks so far."""
    begun = _BEFORE_JSON.match(held)
    begin = begun.end() if begun is not None else 0
    return held[begin : begin + 1] in (b"", b"{", b"[")


def _refuse_own_kv(body: bytes) -> None:
    """Raises BadRequest where a member that is a connector's stands anywhere in the JSON."""
    if b"\x00" in body or body[:2] in (b"\xff\xfe", b"\xfe\xff"):  # Python's reader of JSON takes UTF-16 and UTF-32 too
        raise BadRequest("The request body is not UTF-8.")
    if b"\\u" not in body and not any(name in body for name in _OWN_KEYS):
        return
    check_values(body)
    try:
        value = orjson.loads(body.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None
    if (name := _own_key_in(value)) is not None:
        raise BadRequest(f"'{name}' is not accepted from clients.", name)


def _own_key_in(value: Any) -> str | None:
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if isinstance(one, dict):
            if found := _OWN_NAMES & one.keys():
                return min(found)
            open_values.extend(one.values())
        elif isinstance(one, list):
            open_values.extend(one)
    return None

"""Calls of a layerwise decoder to the proxy's metaserver, off its engine's thread: bounded, retried, failures told."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
CALL_TIMEOUT_S = 30.0
"""The proxy answers within its --metaserver-wait-s, a second by default."""
DELAYS_S = (0.0, 0.1, 0.5)
"""When a call that did not get through is tried."""
MAX_CALLS = 256
"""At once; others wait for their turn."""
MAX_SHOWN_CHARS = 200


class MetaserverCalls:
    """One thread with one loop, started by the first call. `wake` is called when `take_failed` has something."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._failed: deque[tuple[str, str]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    def post(self, url: str, request_id: str, params: dict[str, Any]) -> None:
        """Begin a call and return at once; called by one thread."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="metaserver", daemon=True)
            self._thread.start()
        self._loop.call_soon_threadsafe(self._begin, url, request_id, orjson.dumps(params))

    def take_failed(self) -> list[tuple[str, str]]:
        """(request id, why) of the calls that failed since the last time."""
        taken: list[tuple[str, str]] = []
        while self._failed:
            taken.append(self._failed.popleft())
        return taken

    def close(self) -> None:
        """End every call. Idempotent."""
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            loop.run_until_complete(self._end())
        finally:
            loop.close()

    async def _end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _begin(self, url: str, request_id: str, body: bytes) -> None:
        task = asyncio.ensure_future(self._call(url, request_id, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _call(self, url: str, request_id: str, body: bytes) -> None:
        why = ""
        for delay_s in DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                why = await self._post(url, body)
            except aiohttp.ClientConnectionError as error:
                why = f"{url} cannot be reached: {error}"
                continue
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                why = f"{url} did not answer: {error!r}"
            break
        if why:
            logger.warning("metaserver_call_failed request_id=%s error=%s", request_id, why)
            self._failed.append((request_id, why))
            self._wake()

    async def _post(self, url: str, body: bytes) -> str:
        """What is wrong with the answer; "" if nothing."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
            connector = aiohttp.TCPConnector(limit=MAX_CALLS)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        headers = {"Content-Type": "application/json"}
        async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            if 200 <= answer.status < 300:
                return ""
            text = (await answer.text(errors="replace"))[:MAX_SHOWN_CHARS]
            return f"{url} answered {answer.status}: {text}"

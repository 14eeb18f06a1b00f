"""What the tests of the admin routes share: its calls, and load in the background."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.proxy_blackbox.harness import CHAT, HOST, Answer, Proxy, body_of, eventually, request, text_for


def at(port: int) -> str:
    return f"{HOST}:{port}"


def change(proxy: Proxy, what: str, timeout: float = 15.0, **fields: Any) -> Answer:
    return proxy.post(f"/instances/{what}", fields, timeout)


def shown(proxy: Proxy, role: str, port: int) -> dict[str, Any] | None:
    """What `GET /instances` says of one instance, None if it is no member."""
    found = [
        one for one in proxy.get("/instances").json["instances"] if (one["role"], one["address"]) == (role, at(port))
    ]
    return found[0] if found else None


def state(proxy: Proxy, role: str, port: int) -> str | None:
    found = shown(proxy, role, port)
    return found["state"] if found else None


def becomes(proxy: Proxy, role: str, port: int, wanted: str | None, timeout_s: float = 10.0) -> None:
    def wrong() -> object:
        found = state(proxy, role, port)
        return None if found == wanted else found or "no member"

    eventually(wrong, f"{role} {port} is not {wanted}", timeout_s)


class Load:
    """Requests until told to stop; `wrong` has every answer that was not the right one."""

    def __init__(self, proxy: Proxy, **more: Any) -> None:
        self.num_right = 0
        self.wrong: list[str] = []
        self._proxy = proxy
        self._more = more
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(4)]

    def _run(self, worker: int) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            fields = body_of(CHAT, f"{worker} {number}", stream=bool(number % 2), **self._more)
            try:
                answer = self._proxy.post(CHAT, fields)
                if answer.status == 200 and answer.text == text_for(fields):
                    self.num_right += 1
                else:
                    self.wrong.append(f"{answer.status} {answer.body[:200]!r}")
            except OSError as error:
                self.wrong.append(repr(error))

    def start(self) -> None:
        for one in self._threads:
            one.start()

    def stop(self) -> None:
        self._over.set()
        for one in self._threads:
            one.join(20)


@contextmanager
def under_load(proxy: Proxy, **more: Any) -> Iterator[Load]:
    """At the end every answer must have been right."""
    load = Load(proxy, **more)
    load.start()
    try:
        eventually(lambda: load.num_right < 4 and not load.wrong, "no load", 15)
        yield load
        before = load.num_right
        eventually(lambda: load.num_right < before + 8 and not load.wrong, "the load has stopped", 15)
    finally:
        load.stop()
    assert not load.wrong, load.wrong[:3]


@contextmanager
def in_background(proxy: Proxy, fields: dict[str, Any]) -> Iterator[list[Answer]]:
    """One request, whose answer is in the list at the end."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(request(proxy.port, "POST", CHAT, fields, 30)))
    thread.start()
    try:
        yield answers
    finally:
        thread.join(30)

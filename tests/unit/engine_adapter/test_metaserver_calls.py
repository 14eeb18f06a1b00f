from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson
import pytest

from engine_adapter.metaserver_calls import MetaserverCalls
from tests.integration.deployment import free_port


class Metaserver(ThreadingHTTPServer):
    """Answers with the status that the path names, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.called = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, status: int) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{status}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Metaserver)
        self.server.got.append(orjson.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(int(self.path[1:]))
        self.send_header("Location", "/200")
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"a why")
        self.server.called.set()

    def log_message(self, *_: object) -> None:
        """Not to stderr."""


@pytest.fixture
def metaserver() -> Iterator[Metaserver]:
    server = Metaserver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def calls() -> Iterator[tuple[MetaserverCalls, threading.Event]]:
    woken = threading.Event()
    calls = MetaserverCalls(woken.set)
    yield calls, woken
    calls.close()
    calls.close()


Calls = tuple[MetaserverCalls, threading.Event]


def test_one_that_is_taken_says_nothing(metaserver: Metaserver, calls: Calls) -> None:
    calls[0].post(metaserver.url(200), "r", {"request_id": "cmpl-r-0", "remote_block_ids": [[1, 2]]})
    assert metaserver.called.wait(10)
    assert metaserver.got == [{"request_id": "cmpl-r-0", "remote_block_ids": [[1, 2]]}]
    assert calls[0].take_failed() == [] and not calls[1].is_set()


@pytest.mark.parametrize("status", [404, 502, 307])
def test_a_refusal_is_told_once_and_not_tried_again(metaserver: Metaserver, calls: Calls, status: int) -> None:
    calls[0].post(metaserver.url(status), "r", {})
    assert calls[1].wait(10)
    [(request_id, why)] = calls[0].take_failed()
    assert request_id == "r" and f"answered {status}: a why" in why
    assert len(metaserver.got) == 1 and calls[0].take_failed() == []


def test_nobody_there_is_tried_three_times_and_told(calls: Calls) -> None:
    calls[0].post(f"http://127.0.0.1:{free_port()}/x", "r", {})
    assert calls[1].wait(10)
    [(_, why)] = calls[0].take_failed()
    assert "cannot be reached" in why


def test_closing_ends_what_waits(calls: Calls) -> None:
    calls[0].post(f"http://127.0.0.1:{free_port()}/x", "r", {})
    calls[0].close()
    assert not [thread for thread in threading.enumerate() if thread.name == "metaserver"]

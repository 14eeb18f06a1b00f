"""The relay thread in a proxy that serves: it has the streams, and nobody can tell but by what they cost."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from proxy.relay_library import library
from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    Engines,
    Proxy,
    body_of,
    connected,
    eventually,
    raw_post,
    text_for,
)

Start = Callable[..., Proxy]
WITH_LIBRARY = pytest.mark.skipif(library() is None, reason="built without a C compiler")
BOTH = pytest.mark.parametrize("flags", [(), ("--relay-thread", "off")], ids=["thread", "python"])


def processes(proxy: Proxy) -> list[psutil.Process]:
    top = psutil.Process(proxy.process.popen.pid)
    return [top, *top.children(recursive=True)]


def threads_of(proxy: Proxy) -> list[Path]:
    tasks = [task for one in processes(proxy) for task in Path(f"/proc/{one.pid}/task").iterdir()]
    return [task for task in tasks if (task / "comm").read_text().strip() == "stream-relay"]


def counted(proxy: Proxy, name: str) -> int:
    found = re.search(rf"^pd_proxy_{name}_total (\d+)", proxy.get("/metrics").body.decode(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@WITH_LIBRARY
def test_the_tokens_of_a_stream_are_the_threads(start_proxy: Start) -> None:
    proxy = start_proxy()
    fields = body_of(CHAT, num_tokens=40, stream=True, mock={"interval_s": 0.005})
    assert proxy.post(CHAT, fields).text == text_for(fields)
    eventually(proxy.wrong, "the proxy is not idle")
    assert 36 <= counted(proxy, "lent_stream_events") < counted(proxy, "stream_events"), (
        "all but the first and the last"
    )


def test_off_means_off(start_proxy: Start) -> None:
    assert not threads_of(start_proxy("--relay-thread", "off"))


@BOTH
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_bytes_are_the_same(start_proxy: Start, path: str, flags: tuple[str, ...]) -> None:
    """Many at once, of many lengths, some in bursts and some at a pace."""
    proxy = start_proxy(*flags)

    def one(which: int) -> None:
        pace = {"mock": {"interval_s": 0.003}} if which % 3 == 0 else {}
        usage = {"stream_options": {"include_usage": True}} if which % 2 else {}
        fields = body_of(path, num_tokens=1 + which * 7 % 120, stream=True, **pace, **usage)
        answer = proxy.post(path, fields, X_Request_Id=f"one-{which}-")
        assert (answer.status, answer.text) == (200, text_for(fields))
        *events, last = answer.events
        assert last == "[DONE]" and len({event["id"] for event in events}) == 1
        assert f"one-{which}-" in events[0]["id"]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(80)))


@BOTH
@pytest.mark.parametrize("kind", ["reset_mid", "close_mid", "garbage_mid", "error_event_mid", "recomputed"])
def test_what_was_passed_on_is_gone_on_with(
    start_proxy: Start, engines: Engines, flags: tuple[str, ...], kind: str
) -> None:
    proxy = start_proxy(*flags)
    engines.fault("decode", kind, shared=True, after=35)
    fields = body_of(COMPLETIONS, num_tokens=60, stream=True, mock={"interval_s": 0.002})
    assert proxy.post(COMPLETIONS, fields).text == text_for(fields)
    left = min(one["body"]["max_tokens"] for one in engines.requests("decode"))
    assert 25 <= left <= 27, "a token that comes in one read with the trouble is asked for again"


@BOTH
def test_one_that_a_stop_breaks_off_is_counted_and_its_client_told(start_proxy: Start, flags: tuple[str, ...]) -> None:
    proxy = start_proxy("--drain-timeout-s", "0.3", *flags)
    fields = body_of(COMPLETIONS, num_tokens=60_000, stream=True, mock={"interval_s": 0.005})
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(COMPLETIONS, json.dumps(fields).encode()))
        for _ in range(20):
            assert sock.recv(65536)
        proxy.process.popen.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(65536):
                pass
    assert proxy.process.popen.wait(10) == 0
    told = re.search(r" outcome=client_gone .*output_tokens=(\d+) ", proxy.process.output)
    assert told is not None and int(told[1]) >= 10, proxy.process.output


@WITH_LIBRARY
def test_clients_that_leave_in_the_middle_leave_nothing(start_proxy: Start) -> None:
    proxy = start_proxy()
    fields = body_of(COMPLETIONS, num_tokens=2000, stream=True, mock={"interval_s": 0.002})
    body = json.dumps(fields).encode()
    before = sum(one.num_fds() for one in processes(proxy))
    for _ in range(20):
        with connected(proxy.port) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            while b"data:" not in sock.recv(65536):
                pass
            time.sleep(0.01)
    eventually(proxy.wrong, "the proxy is not idle")
    more = 12  # kept connections to the instances, and one that is about to be closed
    eventually(lambda: max(0, sum(one.num_fds() for one in processes(proxy)) - before - more), "descriptors are left")


@WITH_LIBRARY
def test_a_client_that_stops_reading_stops_its_decoder_and_gets_all_when_it_goes_on(start_proxy: Start) -> None:
    proxy = start_proxy()
    fields = body_of(COMPLETIONS, num_tokens=60_000, stream=True)
    body = json.dumps(fields).encode()
    rss = sum(one.memory_info().rss for one in processes(proxy))
    with connected(proxy.port, timeout=60.0) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        time.sleep(1.5)
        assert sum(one.memory_info().rss for one in processes(proxy)) - rss < 24 << 20
        tail, num_tokens = b"", 0
        while not tail.endswith(b"0\r\n\r\n"):
            read = sock.recv(1 << 20)
            assert read, tail
            num_tokens += (tail[-16:] + read).count(b'"finish_reason":null') - tail[-16:].count(b'"finish_reason":null')
            tail = (tail + read)[-64:]
    assert b"[DONE]" in tail and num_tokens == 59_999, "the last one says that it is finished"
    eventually(proxy.wrong, "the proxy is not idle")

"""Clients that leave, at every phase of a request: nothing stays reserved, handed out, connected or computing.

The `proxy` fixture checks loads, connections and both KV ledgers within 5 seconds after each test.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from typing import Any

import pytest

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

HOW = pytest.mark.parametrize("how", ["fin", "rst"])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def leave(sock: socket.socket, how: str) -> None:
    if how == "rst":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def sent(proxy: Proxy, fields: dict[str, Any], path: str = CHAT) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
    sock.sendall(raw_post(path, json.dumps(fields).encode()))
    return sock


@HOW
@pytest.mark.parametrize("part", [1, 40, 150])
def test_before_the_request_is_whole(proxy: Proxy, engines: Engines, how: str, part: int) -> None:
    raw = raw_post(CHAT, json.dumps(body_of(CHAT)).encode())
    with connected(proxy.port) as sock:
        sock.sendall(raw[:part])
        time.sleep(0.05)
        leave(sock, how)
    assert engines.count("prefill", "requests") == 0


@HOW
@STREAM
def test_in_prefill(proxy: Proxy, engines: Engines, how: str, stream: bool) -> None:
    sock = sent(proxy, body_of(CHAT, stream=stream, mock={"prefill_s": 30}))
    eventually(lambda: not engines.count("prefill", "prefills"), "no prefill began")
    leave(sock, how)
    eventually(proxy.wrong, "the proxy is not idle")
    assert engines.count("decode", "decodes") == 0


@HOW
@STREAM
def test_before_the_decoders_head(proxy: Proxy, engines: Engines, how: str, stream: bool) -> None:
    sock = sent(proxy, body_of(CHAT, stream=stream, mock={"first_token_s": 30}))
    eventually(lambda: not engines.count("decode", "decodes"), "no decode began")
    leave(sock, how)
    eventually(lambda: not engines.count("decode", "aborted"), "the decode was not aborted")


@HOW
def test_while_the_decoder_has_not_consumed_the_kv(proxy: Proxy, engines: Engines, how: str) -> None:
    engines.fault("decode", "hang_before_head", count=2)
    sock = sent(proxy, body_of(CHAT, stream=True))
    eventually(lambda: not engines.count("decode", "faults"), "no decode began")
    leave(sock, how)
    eventually(lambda: engines.state()["kv"]["outstanding"], "the KV was not given back")
    assert engines.count("decode", "release_only") >= 1


@HOW
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_mid_stream(proxy: Proxy, engines: Engines, how: str, path: str) -> None:
    sock = sent(proxy, body_of(path, num_tokens=1000, stream=True, mock={"interval_s": 0.02}), path)
    seen = b""
    while seen.count(b"data: ") < 4:
        seen += sock.recv(65536)
    leave(sock, how)
    eventually(lambda: not engines.count("decode", "aborted"), "the decode was not aborted")


@HOW
def test_in_a_whole_answer_that_is_being_generated(proxy: Proxy, engines: Engines, how: str) -> None:
    sock = sent(proxy, body_of(CHAT, num_tokens=1000, mock={"interval_s": 0.02}))
    eventually(lambda: not engines.count("decode", "decodes"), "no decode began")
    leave(sock, how)
    eventually(lambda: not engines.count("decode", "aborted"), "the decode was not aborted")


@HOW
def test_while_waiting_for_a_retry(proxy: Proxy, engines: Engines, how: str) -> None:
    engines.fault("prefill", "status", status=500, count=2)
    leave(sent(proxy, body_of(CHAT)), how)


def test_two_hundred_clients_that_leave_at_random_moments(proxy: Proxy, engines: Engines) -> None:
    """Whatever the moment: before prefill, in prefill, at hand-off, before the head, in the stream, at the end."""
    moments = random.Random(7)
    open_socks: list[tuple[float, socket.socket, str]] = []
    for number in range(200):
        shape = {"prefill_s": moments.random() * 0.05, "first_token_s": moments.random() * 0.05, "interval_s": 0.005}
        fields = body_of(CHAT, f"client {number}", num_tokens=12, stream=bool(number % 2), mock=shape)
        leaves_at = time.monotonic() + moments.random() * 0.2
        open_socks.append((leaves_at, sent(proxy, fields), moments.choice(["fin", "rst"])))
        now = time.monotonic()
        for one in [entry for entry in open_socks if entry[0] <= now]:
            leave(one[1], one[2])
            open_socks.remove(one)
    for leaves_at, sock, how in sorted(open_socks, key=lambda entry: entry[0]):
        time.sleep(max(0.0, leaves_at - time.monotonic()))
        leave(sock, how)
    eventually(proxy.wrong, "the proxy is not idle")
    eventually(engines.wrong, "the engines are not idle")
    fields = body_of(CHAT)
    assert proxy.post(CHAT, fields).text == text_for(fields)


def test_a_client_that_leaves_does_not_disturb_its_neighbour(proxy: Proxy, engines: Engines) -> None:
    fields = body_of(CHAT, num_tokens=40, stream=True, mock={"interval_s": 0.01})
    neighbour = sent(proxy, fields)
    for _ in range(5):
        leave(sent(proxy, body_of(CHAT, num_tokens=500, stream=True, mock={"interval_s": 0.01})), "rst")
        time.sleep(0.02)
    seen = b""
    while not seen.endswith(b"0\r\n\r\n"):
        seen += neighbour.recv(65536)
    neighbour.close()
    assert seen.count(b'"content":" ') == 40 and b"data: [DONE]" in seen

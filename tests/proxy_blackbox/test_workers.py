"""`--workers 2`: one proxy to whoever looks at it from outside, whichever process answers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest

from tests.proxy_blackbox.admin import at, becomes, change, in_background, shown
from tests.proxy_blackbox.harness import (
    CHAT,
    HOST,
    PROXY,
    Engines,
    Process,
    Proxy,
    body_of,
    connected,
    eventually,
    raw_post,
    read_answer,
    request,
    text_for,
)
from tests.proxy_blackbox.workers import Clients, ask, begin, sample, served, workers

StartProxy = Callable[..., Proxy]
QUICK = ("--health-retry-interval-s", "0.1", "--waiting-retry-interval", "0.1")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Engines]:
    started = Engines(2, 4)
    yield started
    started.process.stop()


def test_each_worker_sees_what_the_other_holds(start_proxy: StartProxy, engines: Engines) -> None:
    """Three long streams in one worker leave the other one decoder, and then none: its request waits for one."""
    proxy = start_proxy("--workers", "2", "--decoder-max-streams", "1")
    with Clients(proxy, 3) as clients:
        (first, second) = clients.of.values()
        for sock in first[:3]:
            begin(sock)
        assert [ask(second[0]).status for _ in range(5)] == [200] * 5
        begin(second[0])
        assert sorted(served(engines).values()) == [1, 1, 1, 6]
        second[1].sendall(raw_post(CHAT, json.dumps(body_of(CHAT)).encode()))
        eventually(lambda: proxy.get("/instances").json["num_queued"] != 1, "nobody waits")
        assert sample(proxy, "pd_proxy_requests_waiting") == 1
        first[0].close()
        assert read_answer(second[1]).status == 200, "room in one worker is room for the other's queue"


def test_a_queue_is_bounded_over_all_workers(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2", "--decoder-max-streams", "1", "--max-queued-requests", "2")
    waiting = raw_post(CHAT, json.dumps(body_of(CHAT)).encode())
    with Clients(proxy, 4) as clients:
        first, second = clients.of.values()
        for sock in first[:4]:
            begin(sock)
        for sock in second[:2]:
            sock.sendall(waiting)
        eventually(lambda: proxy.get("/instances").json["num_queued"] != 2, "they don't wait")
        first[0].close()
        assert read_answer(second[0]).status == 200
        assert read_answer(second[1]).status == 200
        begin(second[0])
        for sock in second[1:3]:
            sock.sendall(waiting)
        eventually(lambda: proxy.get("/instances").json["num_queued"] != 2, "they don't wait")
        assert ask(second[3]).status == 429
        first[1].close()
        assert {read_answer(sock).status for sock in second[1:3]} == {200}


def test_metrics_add_up_to_the_requests_that_were_sent(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2")
    with Clients(proxy) as clients:
        for number in range(24):
            assert ask(clients.each[number % 2], stream=number % 3 == 0).status == 200
        for _ in range(4):  # whoever answers
            assert sample(proxy, "pd_proxy_requests_total", outcome="ok", route="chat") == 24
            assert sample(proxy, "pd_proxy_e2e_seconds_count") == 24
            assert sample(proxy, "pd_proxy_e2e_seconds_bucket", le="+Inf") == 24
            assert sample(proxy, "pd_proxy_ttft_seconds_count") == 8
            assert sample(proxy, "pd_proxy_instance_picks_total", role="decode") == 24
            assert sample(proxy, "pd_proxy_instance_healthy") == 6
            assert sample(proxy, "pd_proxy_workers_serving") == 2
        assert sum(one["load"]["total_requests"] for one in proxy.get("/instances").json["instances"]) == 48
    lines = proxy.get("/metrics").body.decode().splitlines()
    names = [line.split(" ")[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "each family once"


def test_a_worker_that_is_killed_is_replaced_and_only_its_requests_end(
    start_proxy: StartProxy, engines: Engines
) -> None:
    proxy = start_proxy("--workers", "2")
    with Clients(proxy, 2) as clients, in_background(proxy, body_of(CHAT)):
        (lost, its), (left, others) = clients.of.items()
        for sock in (*its, *others):
            assert ask(sock).status == 200
        for sock in (its[0], others[0]):
            begin(sock)
        before = sample(proxy, "pd_proxy_requests_total", route="chat")
        loaded = sum(one["load"]["num_requests"] for one in proxy.get("/instances").json["instances"])
        assert loaded == 2
        os.kill(lost, signal.SIGKILL)
        while its[0].recv(1 << 16):
            pass
        eventually(lambda: proxy.get("/health").body.count(b"degraded") != 1, "not told that one is missing")
        assert others[0].recv(1 << 16) and ask(others[1]).status == 200
        assert sample(proxy, "pd_proxy_requests_total", route="chat") >= before + 1
        eventually(lambda: proxy.get("/health").body, "it was not replaced", 15)
        assert lost not in [one.pid for one in workers(proxy)] and left in [one.pid for one in workers(proxy)]
        assert sample(proxy, "pd_proxy_requests_total", route="chat") >= before + 1
        assert sum(one["load"]["num_requests"] for one in proxy.get("/instances").json["instances"]) == 1
        assert sum(one["load"]["kv_tokens"] for one in proxy.get("/instances").json["instances"]) > 0
        with Clients(proxy) as again:
            assert [ask(sock).status for sock in again.each] == [200, 200]
        assert others[0].recv(1 << 16)
    assert "event=worker_ended" in proxy.process.output and "event=worker_started" in proxy.process.output


def test_counters_never_go_backwards_while_workers_die(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2")
    seen = num_sent = 0.0
    for _ in range(4):
        for _ in range(10):
            num_sent += proxy.post(CHAT, body_of(CHAT)).status == 200
        now = sample(proxy, "pd_proxy_requests_total", outcome="ok", route="chat")
        assert now == num_sent, "what a scrape has seen before the kill is kept"
        os.kill(random.choice(workers(proxy)).pid, signal.SIGKILL)
        for _ in range(5):
            now = sample(proxy, "pd_proxy_requests_total", outcome="ok", route="chat")
            assert seen <= now == num_sent
            seen = now
        eventually(lambda: proxy.get("/health").body, "it was not replaced", 20)


def test_admin_calls_reach_all_and_the_ones_that_come_later(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2", *QUICK)
    with Clients(proxy) as clients:
        for port in engines.decode[1:]:
            answer = change(proxy, "remove", type="decode", instances=at(port), wait_s=5)
            assert answer.status == 200 and shown(proxy, "decode", port) is None
        for sock in clients.each * 3:
            assert ask(sock).status == 200
        assert served(engines) == {engines.decode[0]: 6, **dict.fromkeys(engines.decode[1:], 0)}
        assert change(proxy, "add", type="decode", instances=at(engines.decode[3])).status == 200
        becomes(proxy, "decode", engines.decode[3], "active")
        lease = {"type": "decode", "instance": at(engines.decode[2]), "ttl_s": 60}
        assert change(proxy, "register", **lease).status == 200
        becomes(proxy, "decode", engines.decode[2], "active")
        assert change(proxy, "remove", type="decode", instances=at(engines.decode[0]), wait_s=5).status == 200
        for sock in clients.each * 4:
            assert ask(sock).status == 200
        counts = served(engines)
        assert counts[engines.decode[0]] == 6 and counts[engines.decode[2]] and counts[engines.decode[3]]
    for victim in workers(proxy):  # one after the other: the second learns it from the first's successor
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: proxy.get("/health").body.count(b"degraded") != 1, "not told that one is missing")
        eventually(lambda: proxy.get("/health").body, "it was not replaced", 15)
    with Clients(proxy) as clients:
        for sock in clients.each * 4:
            assert ask(sock).status == 200
    assert served(engines)[engines.decode[0]] == 6 and shown(proxy, "decode", engines.decode[0]) is None
    shown_lease = shown(proxy, "decode", engines.decode[2])
    assert shown_lease is not None and shown_lease["lease_ends_in_s"] > 30 and shown_lease["source"] == "lease"


def test_a_change_that_is_refused_is_made_nowhere(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2")
    assert change(proxy, "add", type="decode", instances="nonsense").status == 400
    assert change(proxy, "role", type="decode", instances="127.0.0.1:1").status == 404
    assert not proxy.get("/instances").json["waiting"]


def test_a_worker_that_is_stuck_is_named_and_the_rest_goes_on(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2", *QUICK)
    assert ask_all(proxy, 10) == [200] * 10
    before = sample(proxy, "pd_proxy_requests_total", outcome="ok", route="chat")
    stuck = workers(proxy)[0]
    stuck.suspend()
    try:
        assert ask_all(proxy, 10) == [200] * 10, "nobody waits for its connections to be taken by it"
        assert sample(proxy, "pd_proxy_requests_total", outcome="ok", route="chat") >= before + 10
        told = change(proxy, "remove", 30.0, type="decode", instances=at(engines.decode[0]))
        assert told.status == 500 and "worker 0: no answer in time" in told.error["message"], told.body
    finally:
        stuck.resume()
    eventually(lambda: shown(proxy, "decode", engines.decode[0]), "it follows when it can")
    assert sample(proxy, "pd_proxy_requests_total", outcome="ok", route="chat") == 20


def ask_all(proxy: Proxy, num: int) -> list[int]:
    return [proxy.post(CHAT, body_of(CHAT)).status for _ in range(num)]


def test_sighup_reloads_in_all(engines: Engines, tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"

    def write(decoders: tuple[int, ...]) -> None:
        lines = [f'host = "{HOST}"', "workers = 2", "waiting_retry_interval = 0.1"]
        for role, ports in (("prefiller", engines.prefill), ("decoder", decoders)):
            lines += [f"{role}_hosts = {[HOST] * len(ports)}", f"{role}_ports = {list(ports)}"]
        file.write_text("\n".join(lines))

    write(engines.decode[:1])
    proxy = Proxy.__new__(Proxy)
    proxy.num_read = 0
    proxy.start([PROXY, "--config", str(file), "--port", "0"])
    try:
        write(engines.decode[1:2])
        os.kill(proxy.process.popen.pid, signal.SIGHUP)
        eventually(lambda: proxy.process.output.count("event=reloaded added=1 removed=1") != 2, "not reloaded")
        becomes(proxy, "decode", engines.decode[1], "active")
        becomes(proxy, "decode", engines.decode[0], None)
        os.kill(workers(proxy)[0].pid, signal.SIGKILL)
        eventually(lambda: proxy.get("/health").body.count(b"degraded") != 1, "not told that one is missing")
        eventually(lambda: proxy.get("/health").body, "it was not replaced", 15)
        os.kill(proxy.process.popen.pid, signal.SIGHUP)
        eventually(lambda: proxy.process.output.count("event=reloaded added=0 removed=0") != 2, "not the same files")
    finally:
        assert proxy.stop() == 0


def test_keys_that_were_changed_hold_in_all_and_in_who_comes_later(engines: Engines, tmp_path: Path) -> None:
    """What was taken back lets nobody in again, whichever process answers."""
    file = tmp_path / "proxy.toml"

    def write(key: str) -> None:
        lines = [f'host = "{HOST}"', "workers = 2", f'api_key = ["{key}"]', 'access_log = "json"']
        for role, ports in (("prefiller", engines.prefill), ("decoder", engines.decode)):
            lines += [f"{role}_hosts = {[HOST] * len(ports)}", f"{role}_ports = {list(ports)}"]
        file.write_text("\n".join(lines))

    def seen(key: str) -> set[int]:
        return {proxy.post(CHAT, body_of(CHAT), Authorization=f"Bearer {key}").status for _ in range(12)}

    write("first")
    proxy = Proxy.__new__(Proxy)
    proxy.num_read = 0
    proxy.start([PROXY, "--config", str(file), "--port", "0"])
    try:
        assert seen("first") == {200}
        write("second")
        os.kill(proxy.process.popen.pid, signal.SIGHUP)
        eventually(lambda: proxy.process.output.count("event=reloaded") != 2, "not reloaded")
        assert (seen("first"), seen("second")) == ({401}, {200})
        for one in workers(proxy):
            os.kill(one.pid, signal.SIGKILL)
            eventually(lambda: proxy.get("/health").body.count(b"degraded") != 1, "not told that one is missing")
            eventually(lambda: proxy.get("/health").body, "it was not replaced", 15)
        assert (seen("first"), seen("second")) == ({401}, {200})
    finally:
        assert proxy.stop() == 0


def test_the_connections_of_all_workers_are_limited(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--workers", "2", "--max-connections", "4")
    with ExitStack() as stack:
        socks = [stack.enter_context(connected(proxy.port)) for _ in range(12)]
        statuses = [ask(sock).status for sock in socks]
    assert 2 <= statuses.count(200) <= 4 and set(statuses) == {200, 503}


def test_decoders_calls_reach_the_worker_whose_request_it_is() -> None:
    engines = Engines(1, 2, "--contract", "layerwise")
    proxy = Proxy(engines, "--workers", "2", "--contract", "layerwise")
    try:
        with Clients(proxy, 2) as clients:
            for number in range(20):
                for some in clients.of.values():
                    fields = body_of(CHAT, f"{number}", stream=number % 2 == 0)
                    some[number % 2].sendall(raw_post(CHAT, json.dumps(fields).encode()))
                    assert read_answer(some[number % 2]).text == text_for(fields)
        eventually(lambda: engines.count("decode", "metaserver_200") != 40, "calls answered")
        assert sample(proxy, "pd_proxy_metaserver_calls_total", outcome="ok") == 40
        guess = {"request_id": "chatcmpl-guess", "remote_host": "evil"}
        for path in ("", "/0", "/1", "/7"):
            assert request(proxy.port, "POST", f"/v1/metaserver{path}", guess).status == 404
    finally:
        assert proxy.stop() == 0
        engines.process.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_and_leaves_no_process(
    start_proxy: StartProxy, engines: Engines, number: signal.Signals
) -> None:
    proxy = start_proxy("--workers", "2")
    children = workers(proxy)
    fields = body_of(CHAT, num_tokens=30, stream=True, mock={"interval_s": 0.03})
    with Clients(proxy) as clients:
        for sock in clients.each:
            sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        eventually(lambda: proxy.get("/healthcheck").json["request_num"] != 2, "not in flight")
        for one in (proxy.process.popen.pid, *(child.pid for child in children)):  # as a terminal and systemd send it
            os.kill(one, number)
        assert [read_answer(sock).text for sock in clients.each] == [text_for(fields)] * 2
    assert proxy.process.popen.wait(10) == 0
    assert not [child for child in children if child.is_running()]
    with pytest.raises(OSError):
        socket.create_connection((HOST, proxy.port), timeout=1)
    assert "Traceback" not in proxy.process.output


def test_a_second_signal_ends_it_at_once(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2")
    children = workers(proxy)
    with Clients(proxy) as clients:
        for sock in clients.each:
            begin(sock)
        os.kill(proxy.process.popen.pid, signal.SIGTERM)
        eventually(lambda: proxy.process.output.count("event=draining") != 2, "not draining")
        os.kill(proxy.process.popen.pid, signal.SIGTERM)
        assert proxy.process.popen.wait(5) == 1
    assert not [child for child in children if child.is_running()]


def test_workers_end_when_their_parent_is_killed(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2")
    children = workers(proxy)
    fields = body_of(CHAT, num_tokens=20, stream=True, mock={"interval_s": 0.03})
    with Clients(proxy) as clients:
        for sock in clients.each:
            sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
            sock.recv(1, socket.MSG_PEEK)
        proxy.process.popen.kill()
        assert [read_answer(sock).text for sock in clients.each] == [text_for(fields)] * 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_worker_that_an_operator_ends_drains_and_is_replaced(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "2")
    old = workers(proxy)
    with Clients(proxy) as clients:
        fields = body_of(CHAT, num_tokens=30, stream=True, mock={"interval_s": 0.03})
        sock = clients.of[old[0].pid][0]
        sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        sock.recv(1, socket.MSG_PEEK)
        os.kill(old[0].pid, signal.SIGTERM)
        assert read_answer(sock).text == text_for(fields)
    eventually(lambda: old[0].is_running() or len(workers(proxy)) != 2, "not replaced", 15)
    assert ask_all(proxy, 4) == [200] * 4


def test_an_occupied_port_and_a_worker_that_cannot_start_are_one_line_and_exit_1() -> None:
    with closing(socket.socket()) as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = _run("--workers", "2", "--host", HOST, "--port", str(port))
        assert ended.returncode == 1 and str(port) in ended.stderr.splitlines()[-1]
    ended = _run("--workers", "3", "--port", "0", "--discover", "k8s")
    assert ended.returncode == 1 and ended.stdout == ""
    assert len(re.findall("^pd-proxy: ", ended.stderr, re.MULTILINE)) == 1 and "Traceback" not in ended.stderr


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROXY, *flags], capture_output=True, text=True, timeout=20)


def test_one_worker_is_one_process(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy("--workers", "1")
    assert workers(proxy) == [] and isinstance(proxy.process, Process)
    assert "workers" not in proxy.get("/instances").json

"""Real processes and raw sockets for the black-box tests of the proxy."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.mock_answers import scripts_of
from tests.forked import popen
from tests.ports import free_port as free_port

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]
PROXY = str(Path(sys.executable).with_name("pd-proxy"))
WORKERS = os.environ.get("PROXY_TEST_WORKERS", "1")  # "2" runs these tests with that many, where a test doesn't say
START_TIMEOUT_S = 30.0
SETTLE_S = 5.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Process:
    """A child with its output in a file; `stop` ends it by SIGTERM, then by SIGKILL."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self.popen = popen(command, self._output, self._output, env={**os.environ, **environment})

    @property
    def output(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode()

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.popen.poll() is None:
            if found := re.search(pattern, self.output):
                return found
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in the output of {self.popen.args!r}:\n{self.output}")

    def stop(self) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            status = self.popen.wait(15)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            status = self.popen.wait()
        if not self._output.closed:
            self._output.close()
        return status


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI error object, whose shape is checked."""
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}, found
        assert found["code"] == self.status and found["message"] and found["type"]
        return found

    @property
    def events(self) -> list[Any]:
        """The stream's events, parsed; `[DONE]` as the string."""
        assert not self.body or self.body.endswith(b"\n\n"), self.body[-200:]
        payloads = [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]
        return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]

    @property
    def text(self) -> str:
        """The generated text of choice 0, of either kind of answer and either endpoint."""
        parsed = self.events if self.headers.get("content-type", "").startswith("text/event-stream") else [self.json]
        choices = [
            c for one in parsed if one != "[DONE]" and "choices" in one for c in one["choices"] if not c["index"]
        ]
        said = [c.get("delta") or c.get("message") or c for c in choices]
        return "".join(one.get("content") or one.get("text") or "" for one in said)


def request(
    port: int, method: str, path: str, body: bytes | dict[str, Any] | None = None, timeout: float = 15.0, **headers: str
) -> Answer:
    """One request on a connection of its own. Header names are given with underscores."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        payload = json.dumps(body).encode() if isinstance(body, dict) else body
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, payload, {"Content-Type": "application/json", **given})
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def body_of(
    path: str, prompt: str = "Say it", num_tokens: int = 5, stream: bool = False, **more: Any
) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    fields = {"model": "mock", **asked, "max_tokens": num_tokens, **more}
    return {**fields, "stream": True} if stream else fields


def text_for(fields: dict[str, Any]) -> str:
    """What the mock engine says to this request, to the first of several prompts."""
    return scripts_of(fields, fields.get("mock", {}).get("num_tokens"))[0].text()


def raw_post(path: str, body: bytes, *header_lines: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *header_lines]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@contextmanager
def connected(port: int, timeout: float = 10.0) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, port), timeout=timeout) as sock:
        yield sock


def read_answer(sock: socket.socket) -> Answer:
    """One answer off a raw socket, which stays open."""
    answer = http.client.HTTPResponse(sock)
    try:
        answer.begin()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        answer.close()


def eventually(check: Callable[[], object], what: str, timeout_s: float = SETTLE_S) -> None:
    """Wait until `check()` is falsy: it returns what is still wrong."""
    deadline = time.monotonic() + timeout_s
    while wrong := check():
        assert time.monotonic() < deadline, f"{what} after {timeout_s} s: {wrong}"
        time.sleep(0.02)


class Engines:
    """The mock engines and their control port."""

    def __init__(self, num_prefill: int, num_decode: int, *flags: str) -> None:
        ports = ["--prefill-ports", *["0"] * num_prefill, "--decode-ports", *["0"] * num_decode]
        self.process = Process([sys.executable, "-m", "bench.mock_engine", *ports, *flags])
        found = self.process.wait_for(r"ready control=(\d+) prefill=([\d,]+) decode=([\d,]+)\n")
        self.control_port = int(found[1])
        self.prefill, self.decode = (tuple(map(int, found[k].split(","))) for k in (2, 3))

    def _post(self, path: str, **fields: Any) -> None:
        answer = request(self.control_port, "POST", path, fields)
        assert answer.status == 200, answer.body

    def fault(self, where: int | str, kind: str, **more: Any) -> None:
        """`where` is a port, or "prefill" or "decode" for all of that role."""
        self._post("/mock/fault", **({"role": where} if isinstance(where, str) else {"port": where}), kind=kind, **more)

    def stop(self, port: int) -> None:
        self._post("/mock/instance", port=port, action="stop")

    def start(self, port: int) -> None:
        self._post("/mock/instance", port=port, action="start")

    def go_deaf(self, port: int) -> None:
        """Whoever connects waits in vain."""
        self._post("/mock/instance", port=port, action="deaf")

    def act(self, port: int, action: str) -> None:
        """ "freeze" and "thaw" (nothing is answered), "mute" (probes are not answered)."""
        self._post("/mock/instance", port=port, action=action)

    def answer(self, port: int, route: str, status: int) -> None:
        """From now on, on a route beside the hot ones (`bench.mock_routes`)."""
        self._post("/mock/instance", port=port, action="answer", route=route, status=status)

    def configure(self, **fields: Any) -> None:
        self._post("/mock/config", **fields)

    def reset(self) -> None:
        self._post("/mock/reset")

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = request(self.control_port, "GET", "/mock/state").json
        return found

    def count(self, role: str, what: str) -> int:
        return sum(one["counts"].get(what, 0) for one in self.state()["instances"] if one["role"] == role)

    def requests(self, role: str) -> list[dict[str, Any]]:
        """What the instances of a role were sent, with `headers` lower-cased."""
        by_port = request(self.control_port, "GET", "/mock/requests").json
        ports = self.prefill if role == "prefill" else self.decode
        return [one for port in ports for one in by_port[str(port)]]

    def wrong(self) -> object:
        """What keeps the engines from being idle and content."""
        state = self.state()
        running = [one for one in state["instances"] if one["num_running"]]
        return state["kv"]["violations"] or state["kv"]["outstanding"] or running


class Proxy:
    def __init__(self, engines: Engines, *flags: str, **environment: str) -> None:
        self.num_read = 0
        """How much of its log `settled` has judged."""
        command = [PROXY, "--host", HOST, "--port", "0", "--workers", WORKERS]
        for role, ports in (("prefiller", engines.prefill), ("decoder", engines.decode)):
            command += [f"--{role}-hosts", *[HOST] * len(ports), f"--{role}-ports", *map(str, ports)]
        self.start([*command, *flags], **environment)

    def start(self, command: list[str], **environment: str) -> None:
        """On a port that the system gives it: one that was found free before could be another's by now."""
        self.process = Process(command, **environment)
        self.port = int(self.process.wait_for(r"ready listen=\S+:(\d+)")[1])
        self.wait_until_serving()

    def wait_until_serving(self) -> None:
        def wrong() -> object:
            assert self.process.popen.poll() is None, self.process.output
            try:
                status = request(self.port, "GET", "/healthcheck").status
            except OSError as error:
                return error
            return None if status == 200 else status

        eventually(wrong, "the proxy does not serve", START_TIMEOUT_S)

    def post(self, path: str, body: bytes | dict[str, Any], timeout: float = 15.0, **headers: str) -> Answer:
        return request(self.port, "POST", path, body, timeout, **headers)

    def get(self, path: str) -> Answer:
        return request(self.port, "GET", path)

    def wrong(self) -> object:
        """What keeps the proxy from being idle."""
        state = self.get("/instances").json
        loads = [one for one in state["instances"] if one["load"]["num_requests"] or one["load"]["num_tokens"]]
        active = [one for one in state["instances"] if one["connections"]["active"]]
        open_kv = state["kv_ledger"]["num_entries"] or state["num_reclaims_open"]
        return loads or active or open_kv or state["num_in_flight"] or self.get("/healthcheck").json["request_num"]

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.popen.pid).memory_info().rss)

    def stop(self) -> int:
        return self.process.stop()


def settled(proxy: Proxy, engines: Engines) -> None:
    """The ledgers of both sides are empty within 5 seconds, the contract was kept, and nothing was logged as a bug."""
    try:
        eventually(proxy.wrong, "the proxy is not idle")
        eventually(engines.wrong, "the engines are not idle, or were wronged")
    finally:
        logged, proxy.num_read = proxy.process.output[proxy.num_read :], len(proxy.process.output)
    assert "Traceback" not in logged, logged[max(0, logged.find("Traceback") - 500) :][:3000]

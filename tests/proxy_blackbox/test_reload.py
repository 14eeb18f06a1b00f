"""SIGHUP reads the configuration file again; SIGTERM drains under load."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.proxy_blackbox.admin import Load, at, becomes, under_load
from tests.proxy_blackbox.harness import (
    CHAT,
    HOST,
    PROXY,
    Answer,
    Engines,
    Proxy,
    body_of,
    eventually,
    free_port,
    request,
    text_for,
)


class FromFile(Proxy):
    """A proxy whose instances stand in a file that a test may write anew."""

    def __init__(self, file: Path, prefillers: tuple[int, ...], decoders: tuple[int, ...]) -> None:
        self.file = file
        self.num_read = 0
        self.write(prefillers, decoders)
        self.start([PROXY, "--config", str(file), "--port", "0"])

    def write(self, prefillers: tuple[int, ...], decoders: tuple[int, ...], more: str = "") -> None:
        lines = [f'host = "{HOST}"', more]
        for role, ports in (("prefiller", prefillers), ("decoder", decoders)):
            lines += [f"{role}_hosts = {[HOST] * len(ports)}", f"{role}_ports = {list(ports)}"]
        self.file.write_text("\n".join(lines))

    def reload(self, says: str) -> str:
        """The line of the log that `says` it was done, or was not."""
        before = len(self.process.output)
        os.kill(self.process.popen.pid, signal.SIGHUP)
        eventually(lambda: says not in self.process.output[before:], f"no {says}")
        return next(line for line in self.process.output[before:].splitlines() if says in line)


@pytest.fixture
def proxy(engines: Engines, tmp_path: Path) -> Iterator[FromFile]:
    """1 prefiller and 1 decoder of two."""
    started = FromFile(tmp_path / "proxy.toml", engines.prefill[:1], engines.decode[:1])
    yield started
    assert "Traceback" not in started.process.output, started.process.output
    started.stop()


def test_a_changed_list_takes_effect_under_load(proxy: FromFile, engines: Engines) -> None:
    with under_load(proxy, mock={"interval_s": 0.005}):
        proxy.write(engines.prefill, engines.decode[1:])
        proxy.reload("event=reloaded added=2 removed=1")
        becomes(proxy, "decode", engines.decode[1], "active")
        becomes(proxy, "prefill", engines.prefill[1], "active")
    becomes(proxy, "decode", engines.decode[0], None)


def test_a_list_that_is_wholly_new_is_no_outage(proxy: FromFile, engines: Engines) -> None:
    proxy.write(engines.prefill, ())
    proxy.file.write_text(proxy.file.read_text().replace("decoder_hosts = []", f'decoder_hosts = ["{HOST}"]'))
    proxy.file.write_text(proxy.file.read_text().replace("decoder_ports = []", f"decoder_ports = [{free_port()}]"))
    proxy.reload("event=reloaded added=2 removed=1")
    becomes(proxy, "decode", engines.decode[0], "active")  # the new one does not answer yet
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    proxy.write(engines.prefill, engines.decode[1:])
    proxy.reload("event=reloaded added=1 removed=1")
    becomes(proxy, "decode", engines.decode[1], "active")
    becomes(proxy, "decode", engines.decode[0], None)
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    proxy.write(engines.prefill, ())
    proxy.reload("event=reloaded added=0 removed=1")
    becomes(proxy, "decode", engines.decode[1], None)  # nobody is awaited: then none is what was meant


def test_what_an_operator_added_is_not_the_files_to_remove(proxy: FromFile, engines: Engines) -> None:
    fields = {"type": "decode", "instances": at(engines.decode[1])}
    assert request(proxy.port, "POST", "/instances/add", fields).status == 200
    becomes(proxy, "decode", engines.decode[1], "active")
    proxy.reload("event=reloaded added=0 removed=0")
    becomes(proxy, "decode", engines.decode[1], "active")


def test_keys_that_need_a_restart_are_named(proxy: FromFile, engines: Engines) -> None:
    proxy.write(engines.prefill, engines.decode, "max_retries = 7\nprefill_timeout_s = 9")
    line = proxy.reload("event=reload_needs_restart")
    assert "WARNING" in line and "keys=max_retries,prefill_timeout_s" in line
    becomes(proxy, "decode", engines.decode[1], "active")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("decoder_hosts = [", "is not TOML"),
        ('decoder_host = ["a"]', "did you mean decoder_hosts?"),
        ("decoder_ports = [0]", "decoder_ports"),
        ("max_retries = 'x'", "max_retries"),
        ("", "prefiller_hosts is not there any more"),
    ],
)
def test_a_broken_file_changes_nothing(proxy: FromFile, engines: Engines, text: str, says: str) -> None:
    proxy.file.write_text(text)
    line = proxy.reload("event=reload_failed")
    assert "ERROR" in line and says in line
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    proxy.write(engines.prefill, engines.decode)
    proxy.reload("event=reloaded added=2 removed=0")


def test_without_a_file_there_is_nothing_to_change(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy()
    os.kill(proxy.process.popen.pid, signal.SIGHUP)
    eventually(lambda: "event=reloaded added=0 removed=0" not in proxy.process.output, "not reloaded")
    assert proxy.post(CHAT, body_of(CHAT)).status == 200


def test_sigterm_under_load_loses_nothing_that_was_begun(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy()
    asked: list[tuple[dict[str, Any], Answer]] = []

    def ask(number: int) -> None:
        fields = body_of(CHAT, f"{number}", 40, stream=bool(number % 3), mock={"interval_s": 0.03, "prefill_s": 0.2})
        asked.append((fields, proxy.post(CHAT, fields, 30)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for one in threads:
        one.start()
    eventually(lambda: proxy.get("/healthcheck").json["request_num"] != 24, "not all in flight")
    os.kill(proxy.process.popen.pid, signal.SIGTERM)
    for one in threads:
        one.join(30)
    assert len(asked) == 24
    for fields, answer in asked:
        assert answer.status == 200 and answer.text == text_for(fields)
    assert proxy.process.popen.wait(10) == 0
    assert "event=stopped drained=True" in proxy.process.output and "Traceback" not in proxy.process.output
    eventually(engines.wrong, "the engines are not idle")


def test_sigterm_while_clients_keep_coming_ends_in_time(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    """What was answered was answered rightly; what came too late was refused at the door."""
    proxy = start_proxy()
    load = Load(proxy, mock={"interval_s": 0.01})
    load.start()
    try:
        eventually(lambda: load.num_right < 8, "no load", 15)
        os.kill(proxy.process.popen.pid, signal.SIGTERM)
        assert proxy.process.popen.wait(10) == 0
    finally:
        load.stop()
    assert all(re.match("ConnectionRefused|ConnectionReset|RemoteDisconnected", one) for one in load.wrong), load.wrong
    assert "event=stopped drained=True" in proxy.process.output and "Traceback" not in proxy.process.output
    eventually(engines.wrong, "the engines are not idle")


def test_every_line_of_the_log_has_one_kind_of_time_stamp(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy()
    proxy.post(CHAT, body_of(CHAT))
    eventually(lambda: "proxy.access" not in proxy.process.output, "no access log")
    lines = [line for line in proxy.process.output.splitlines() if not line.startswith("ready ")]
    assert len(lines) >= 2
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} [A-Z]+ proxy\.", line) for line in lines), lines


def test_a_clients_fault_is_not_logged_as_an_instances(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy()
    engines.fault("prefill", "status", status=404)
    assert proxy.post(CHAT, body_of(CHAT)).status == 404
    eventually(lambda: "status=404 outcome=client_error" not in proxy.process.output, "not logged so")

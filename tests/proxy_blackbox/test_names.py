"""A host name is looked up again while the proxy runs: its /etc/hosts is one of its own, in a mount namespace."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy_blackbox.admin import at
from tests.proxy_blackbox.harness import CHAT, HOST, PROXY, Engines, Proxy, body_of, eventually, text_for

NAME, ELSEWHERE = "decoders.test", "127.0.0.9"
WITH_HOSTS = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"')


class Named(Proxy):
    """A proxy whose decoder is a name, which `hosts` resolves."""

    def __init__(self, hosts: Path, prefiller: int, decoder: int) -> None:
        self.start([
            *WITH_HOSTS, str(hosts), PROXY, "--host", HOST, "--port", "0", "--dns-refresh-interval", "0.2",
            "--prefiller-hosts", HOST, "--prefiller-ports", str(prefiller),
            "--decoder-hosts", NAME, "--decoder-ports", str(decoder),
        ])  # fmt: skip


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Path]:
    found = tmp_path / "hosts"
    found.write_text(f"127.0.0.1 localhost\n{HOST} {NAME}\n")
    if subprocess.run([*WITH_HOSTS, str(found), "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not to be had")
    yield found


def decoders(proxy: Proxy) -> list[str]:
    shown = proxy.get("/instances").json["instances"]
    return [one["address"] for one in shown if one["role"] == "decode" and one["state"] == "active"]


def test_a_name_that_moves_takes_its_instance_along(hosts: Path, engines: Engines) -> None:
    port = engines.decode[0]
    proxy = Named(hosts, engines.prefill[0], port)
    try:
        eventually(lambda: not decoders(proxy), "the name is no instance")
        fields = body_of(CHAT)
        assert proxy.post(CHAT, fields).text == text_for(fields)
        hosts.write_text(f"127.0.0.1 localhost\n{ELSEWHERE} {NAME}\n{HOST} {NAME}\n")
        eventually(lambda: at(port) not in decoders(proxy), "it is none of the two that the name means", 10)
        hosts.write_text(f"127.0.0.1 localhost\n{ELSEWHERE} {NAME}\n")
        eventually(lambda: at(port) in decoders(proxy), "the name means it no more, and it stayed", 10)
        hosts.write_text(f"127.0.0.1 localhost\n{HOST} {NAME}\n")
        eventually(lambda: at(port) not in decoders(proxy), "the name's new address did not join", 10)
        assert proxy.post(CHAT, fields).text == text_for(fields)
    finally:
        proxy.stop()

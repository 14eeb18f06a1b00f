from __future__ import annotations

import pytest

from engine_adapter.torch_engine.media_addresses import is_allowed_domain, is_public, literal_address

NOT_PUBLIC = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.9",
    "224.0.0.1",
    "239.1.2.3",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd12:3456::1",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:a9fe:a9fe",
    "::127.0.0.1",
    "::ffff:0:0",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a00:1::",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
]
PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "172.32.0.1",
    "192.169.0.1",
    "2606:4700::1111",
    "2a00:1450:4001:830::200e",
    "::ffff:8.8.8.8",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(address)


def test_literal_addresses() -> None:
    assert literal_address("127.0.0.1") == "127.0.0.1"
    assert literal_address("[::1]") == literal_address("0:0:0:0:0:0:0:1") == "::1"
    assert literal_address("fe80::1%eth0") == "fe80::1"
    assert literal_address("localhost") is None
    assert literal_address("2130706433") is None, "left to the resolver, whose answer is judged"


def test_domains_are_compared_whole() -> None:
    allowed = ("upload.example.org", "Example.com")
    assert is_allowed_domain("example.com.", allowed)
    assert is_allowed_domain("UPLOAD.example.org", allowed)
    assert not is_allowed_domain("evil-example.com", allowed)
    assert not is_allowed_domain("sub.example.com", allowed)
    assert is_allowed_domain("anything", ())

from __future__ import annotations

import pytest

from proxy.config import Address
from proxy.errors import BadRequest
from proxy.instance import canonical
from proxy.instances_api import parse_address


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("localhost", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "0:0:0:0:0:0:0:1"),
        ("Node-1.EXAMPLE", "node-1.example"),
    ],
)
def test_two_spellings_of_one_address(one: str, other: str) -> None:
    assert canonical(Address(one, 8000)) == canonical(Address(other, 8000))
    assert canonical(Address(one, 8000)) != canonical(Address(other, 8001))
    assert canonical(Address("127.0.0.2", 1)) != canonical(Address("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:8000", Address("10.0.0.1", 8000)),
        ("  node-1:1 ", Address("node-1", 1)),
        ("[fe80::1]:65535", Address("fe80::1", 65535)),
    ],
)
def test_an_address_is_read(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text.strip()


@pytest.mark.parametrize("text", ["", ":1", "a:", "a", "a:65536", "a b:1", "[a]:1", "[::1]", "a:1/", "u@a:1", "a:１"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="is not host:port"):
        parse_address(text)

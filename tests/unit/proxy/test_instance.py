from __future__ import annotations

import asyncio

import pytest

from proxy.config import Address, ProxyConfig
from proxy.errors import BadRequest
from proxy.instance import Fleet, Role, Source, canonical
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


async def test_beside_the_first_speed_that_is_measured_nobody_counts_at_a_made_up_one() -> None:
    """Or all would go to that instance, until the next tick."""
    host = "127.0.0.1"
    config = ProxyConfig(prefiller_hosts=[host], prefiller_ports=[1], decoder_hosts=[host] * 3, decoder_ports=[1, 2, 3])
    fleet = Fleet(config, asyncio.get_running_loop())
    fleet.admit(fleet.create(Role.DECODE, Address(host, 4), Source.ADMIN))
    loads = [one.load for one in fleet.members[Role.DECODE]]
    prefill_speed = fleet.members[Role.PREFILL][0].load.speed
    loads[3].observe(10_000_000, 1.0)
    assert [load.speed for load in loads] == [10_000_000] * 4
    assert fleet.members[Role.PREFILL][0].load.speed == prefill_speed, "another role, another kind of work"
    loads[0].observe(4_000_000, 1.0)
    assert [load.speed for load in loads] == [4_000_000, 7_000_000, 7_000_000, 10_000_000]
    loads[1].observe(8_000_000, 1.0)
    loads[3].observe(10_000_000, 1.0)
    assert loads[0].speed == 4_000_000, "what was measured stays"
    for one in fleet.all:
        one.close()
